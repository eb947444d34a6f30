// Products of matrices in global memory, and the linear equations of polar's derivative, by one block.
#pragma once

#include "polar_block.cuh"

namespace lipfast {
namespace {

// sums += (scale A - shift B) B^H for matrices in global memory, a slice of columns at a time.
template <int kPlanes, int kEach>
__device__ __forceinline__ void multiply_global(const float* a, const float* b, float scale,
                                                float shift, int m, int n, float* buffer,
                                                Tile<kPlanes, kEach>& sums) {
  constexpr int kSlice = kSide / 2 * kEach;
  const Matrix left{buffer, m, kSlice, polar_stride(kSlice)};
  const Matrix right{left.end(kPlanes), m, kSlice, polar_stride(kSlice)};
  const int thread = threadIdx.y * kSide + threadIdx.x;
  for (int first = 0; first < n; first += kSlice) {
    __syncthreads();  // the last slice has been read
    for (int at = thread; at < kPlanes * m * kSlice; at += kPolarThreads) {
      const int line = at / kSlice, k = at % kSlice;
      const int64_t from = int64_t(line) * n + first + k;
      const float value = first + k < n ? b[from] : 0.f;
      right.at[line * right.stride + k] = value;
      left.at[line * left.stride + k] = first + k < n ? scale * a[from] - shift * value : 0.f;
    }
    __syncthreads();
    multiply<true, false>(left, right, sums);
  }
  __syncthreads();
}

// tile = M + sign M^H for the M of which each thread holds its part in `tile`; M stays in `at`.
template <int kPlanes, int kEach>
__device__ __forceinline__ void add_adjoint(Tile<kPlanes, kEach>& tile, const Matrix& at,
                                            float sign) {
  __syncthreads();
  tile.store(at.rows, at.rows, [&](int p, int i, int j, float value) { at(p, i, j) = value; });
  __syncthreads();
  tile.load(at.rows, at.rows, [&](int p, int i, int j) {
    return p == 0 ? at(p, i, j) + sign * at(p, j, i) : at(p, i, j) - sign * at(p, j, i);
  });
}

// Re tr(A^H B) of a matrix in shared memory and one that the threads hold.
template <int kPlanes, int kEach>
__device__ __forceinline__ float inner(const Matrix& a, const Tile<kPlanes, kEach>& b,
                                       float* scratch) {
  float sum = 0;
  b.store(a.rows, a.rows, [&](int p, int i, int j, float value) { sum += a(p, i, j) * value; });
  return sum_all(sum, scratch);
}

template <int kPlanes, int kEach>
__device__ __forceinline__ float squares(const Tile<kPlanes, kEach>& a, int m, float* scratch) {
  float sum = 0;
  a.store(m, m, [&](int, int, int, float value) { sum += value * value; });
  return sum_all(sum, scratch);
}

// Solves H X + X H = R for X^H = sign X, by conjugate gradients; `direction` ends as X.
template <int kPlanes, int kEach>
__device__ __forceinline__ void solve(const Matrix& h, Tile<kPlanes, kEach>& r, float sign,
                                      int steps, const Matrix& direction, const Matrix& buffer,
                                      float* scratch) {
  using Sums = Tile<kPlanes, kEach>;
  const int m = h.rows;
  r.store(m, m, [&](int p, int i, int j, float value) { direction(p, i, j) = value; });
  Sums x;
  float rr = squares(r, m, scratch);
  const float enough = rr * 1e-12f;
  float alpha = 0;
  for (int step = 0; step < steps; ++step) {
    if (rr <= enough) {  // the same for the whole block
      alpha = 0;
      break;
    }
    __syncthreads();
    Sums image;
    multiply<false, false>(h, direction, image);
    add_adjoint(image, buffer, sign);
    const float curvature = inner(direction, image, scratch);
    if (curvature <= 0) {
      alpha = 0;
      break;
    }
    alpha = rr / curvature;
    Sums::each([&](int u, int v, int i, int j) {
      if (i >= m || j >= m) return;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        x.at[p][u][v] += alpha * direction(p, i, j);
        r.at[p][u][v] -= alpha * image.at[p][u][v];
      }
    });
    const float last = rr;
    rr = squares(r, m, scratch);
    r.store(m, m, [&](int p, int i, int j, float value) {
      direction(p, i, j) = value + rr / last * direction(p, i, j);
    });
  }
  // One more step, as long as the last: no product, and nearly as good as one of its own length.
  __syncthreads();
  x.store(m, m, [&](int p, int i, int j, float value) {
    direction(p, i, j) = value + alpha * direction(p, i, j);
  });
  __syncthreads();
}

}  // namespace
}  // namespace lipfast
