// What a block of 16 x 16 threads does with matrices in shared memory: products, sums, transfers.
// Thread (y, x) holds the elements (y + 16 u, x + 16 v) of a result, u, v < kEach.
#pragma once

#include <cfloat>

#include "polar.h"

namespace lipfast {
namespace {

constexpr int kSide = 16;
static_assert(kSide * kSide == kPolarThreads, "the block is square");

// In shared memory: row i of plane p begins at at[(p rows + i) stride].
struct Matrix {
  float* at;
  int rows;
  int columns;
  int stride;

  __device__ float& operator()(int plane, int i, int j) const {
    return at[(plane * rows + i) * stride + j];
  }
  __device__ float* end(int planes) const { return at + planes * rows * stride; }
};

template <int kPlanes, int kEach>
struct Tile {
  float at[kPlanes][kEach][kEach] = {};

  // Calls use(u, v, i, j) for each element of this thread.
  template <typename Use>
  static __device__ __forceinline__ void each(Use use) {
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
#pragma unroll
      for (int v = 0; v < kEach; ++v) {
        use(u, v, int(threadIdx.y) + kSide * u, int(threadIdx.x) + kSide * v);
      }
    }
  }

  // For the elements inside the matrix: set(p, i, j) = this.
  template <typename Set>
  __device__ __forceinline__ void store(int rows, int columns, Set set) const {
    each([&](int u, int v, int i, int j) {
      if (i >= rows || j >= columns) return;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) set(p, i, j, at[p][u][v]);
    });
  }

  // This = get(p, i, j) inside the matrix, 0 outside.
  template <typename Get>
  __device__ __forceinline__ void load(int rows, int columns, Get get) {
    each([&](int u, int v, int i, int j) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        at[p][u][v] = i < rows && j < columns ? get(p, i, j) : 0.f;
      }
    });
  }
};

__device__ __forceinline__ int at_most(int i, int last) { return i < last ? i : last; }

// this += A B^H (kAdjoint) or A B. Rows and columns outside repeat the last one; their results are
// not stored. With kTriangle only the blocks of 16 x 16 on and above the diagonal are computed.
template <bool kAdjoint, bool kTriangle, int kPlanes, int kEach>
__device__ __forceinline__ void multiply(const Matrix& a, const Matrix& b,
                                         Tile<kPlanes, kEach>& sums, int first_column = 0) {
  const int depth = a.columns;
  const int last_row = a.rows - 1, last_column = (kAdjoint ? b.rows : b.columns) - 1;
  int row[kEach], column[kEach];
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    row[u] = at_most(int(threadIdx.y) + kSide * u, last_row) * a.stride;
    const int j = at_most(first_column + int(threadIdx.x) + kSide * u, last_column);
    column[u] = kAdjoint ? j * b.stride : j;
  }
  const int step = kAdjoint ? 1 : b.stride;
  const int a_plane = a.rows * a.stride, b_plane = b.rows * b.stride;
#pragma unroll 2
  for (int k = 0; k < depth; ++k) {
    float left[kPlanes][kEach], right[kPlanes][kEach];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        left[p][u] = a.at[p * a_plane + row[u] + k];
        right[p][u] = b.at[p * b_plane + column[u] + k * step];
      }
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
#pragma unroll
      for (int v = 0; v < kEach; ++v) {
        if (kTriangle && u > v) continue;
        sums.at[0][u][v] += left[0][u] * right[0][v];
        if constexpr (kPlanes == 2) {
          const float im = kAdjoint ? -right[1][v] : right[1][v];
          sums.at[0][u][v] -= left[1][u] * im;
          sums.at[1][u][v] += left[0][u] * im;
          sums.at[1][u][v] += left[1][u] * right[0][v];
        }
      }
    }
  }
}

// Writes the self-adjoint matrix of which `tile` holds the blocks on and above the diagonal.
template <int kPlanes, int kEach>
__device__ __forceinline__ void store_mirrored(const Tile<kPlanes, kEach>& tile,
                                               const Matrix& out) {
  Tile<kPlanes, kEach>::each([&](int u, int v, int i, int j) {
    if (u > v || i >= out.rows || j >= out.rows) return;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      out(p, i, j) = tile.at[p][u][v];
      if (u < v) out(p, j, i) = p == 0 ? tile.at[p][u][v] : -tile.at[p][u][v];
    }
  });
}

// Combines one value of each thread, in a fixed order; every thread gets the result.
template <typename Combine>
__device__ __forceinline__ float combine_all(float value, float* scratch, Combine combine) {
  const int thread = threadIdx.y * kSide + threadIdx.x;
  __syncthreads();  // whoever reads the last contents is done
#if defined(__CUDA_ARCH__)
  constexpr int kWarp = 32;
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, lane));
  }
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
#else  // without shuffles, each thread is a warp
  constexpr int kWarp = 1;
  scratch[thread] = value;
#endif
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < kPolarThreads / kWarp; ++warp) value = combine(value, scratch[warp]);
  return value;
}

__device__ __forceinline__ float sum_all(float value, float* scratch) {
  return combine_all(value, scratch, [](float a, float b) { return a + b; });
}

// NaN wins.
__device__ __forceinline__ float largest_all(float value, float* scratch) {
  return combine_all(value, scratch, [](float a, float b) { return b > a || b != b ? b : a; });
}

__device__ __forceinline__ float magnitude(float value) {
  return value < 0 ? -value : value;
}

// The largest entry of `count` numbers in global memory.
__device__ __forceinline__ float largest_entry(const float* x, int64_t count, float* scratch) {
  float largest = 0;
  for (int64_t i = threadIdx.y * kSide + threadIdx.x; i < count; i += kPolarThreads) {
    const float value = magnitude(x[i]);
    if (value > largest || value != value) largest = value;
  }
  return largest_all(largest, scratch);
}

// What to divide by for a largest entry of about 1, where the reciprocal is finite.
__device__ __forceinline__ float divisor(float largest) {
  if (largest == 0) return 1;
  return largest < FLT_MIN ? FLT_MIN : largest;
}

// Copies columns first, first + 1, ... of a matrix in global memory to `to`, zeros beyond its end.
template <int kPlanes>
__device__ __forceinline__ void load_columns(const float* from, int columns, int first,
                                             const Matrix& to) {
  const int thread = threadIdx.y * kSide + threadIdx.x;
  const int count = kPlanes * to.rows * to.columns;
  for (int at = thread; at < count; at += kPolarThreads) {
    const int line = at / to.columns, j = at % to.columns;
    to.at[line * to.stride + j] =
        first + j < columns ? from[int64_t(line) * columns + first + j] : 0.f;
  }
}

}  // namespace
}  // namespace lipfast
