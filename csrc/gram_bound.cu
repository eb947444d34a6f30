// gram_bound on CUDA: a block of 256 threads computes a tile of 64 x 64 numbers, 4 x 4 per thread,
// from operands that pass through shared memory in slices of 16. Every sum has a fixed order.
#include "cuda_on_cpu.h"

#include <stdexcept>
#include <string>

#include "gram_bound.h"

namespace lipfast {
namespace {

constexpr int kSide = 16;  // threads in x and in y
constexpr int kThreads = kSide * kSide;
constexpr int kEach = 4;   // rows and columns of a thread
constexpr int kTile = kGramBoundTile;
constexpr int kSlice = 16;
static_assert(kTile == kSide * kEach, "the threads cover the tile");

// A slice of an operand: [k][position], with a gap so that both orders of filling are spread over
// the banks, and four positions stay aligned.
template <typename T>
using Slice = T[kSlice][kTile + kEach];

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <typename T>
__device__ __forceinline__ void multiply(const Slice<T>& left, const Slice<T>& right,
                                         T (&sums)[kEach][kEach]) {
#pragma unroll
  for (int k = 0; k < kSlice; ++k) {
    const auto l = *reinterpret_cast<const Four<T>*>(&left[k][threadIdx.y * kEach]);
    const auto r = *reinterpret_cast<const Four<T>*>(&right[k][threadIdx.x * kEach]);
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
#pragma unroll
      for (int v = 0; v < kEach; ++v) sums[u][v] += l.at[u] * r.at[v];
    }
  }
}

// Fills slice[k][p] with get(k, p), neighbouring threads along p, or along k when kAlongK.
template <bool kAlongK, typename T, typename Get>
__device__ __forceinline__ void fill(Slice<T>& slice, Get get) {
  const int thread = threadIdx.y * kSide + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kSlice * kTile / kThreads; ++i) {
    const int at = thread + i * kThreads;
    const int k = kAlongK ? at % kSlice : at / kTile;
    const int p = kAlongK ? at / kSlice : at % kTile;
    slice[k][p] = get(k, p);
  }
}

// Adds up what the 16 threads of each row (or column) of the tile hold, in order, and writes it.
template <typename T>
__device__ __forceinline__ void write_sums(T (&shared)[kTile][kSide + 1], const T (&sums)[kEach],
                                           int line, int place, T* out, int64_t first,
                                           int64_t channels) {
  __syncthreads();  // whoever reads the last contents is done
#pragma unroll
  for (int u = 0; u < kEach; ++u) shared[line * kEach + u][place] = sums[u];
  __syncthreads();
  const int thread = threadIdx.y * kSide + threadIdx.x;
  if (thread >= kTile || first + thread >= channels) return;
  T sum = 0;
  for (int i = 0; i < kSide; ++i) sum += shared[thread][i];
  out[first + thread] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gram_bound_forward_kernel(GramBoundParams p) {
  alignas(sizeof(Four<T>)) __shared__ Slice<T> left, right;
  __shared__ T reduction[kTile][kSide + 1];
  const int64_t c = p.channels, tiles = (c + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / tiles, column = blockIdx.x % tiles;
  const int64_t offset = blockIdx.y, offsets = gridDim.y, batch = blockIdx.z;
  const int64_t i0 = row * kTile, j0 = column * kTile;
  T* out = static_cast<T*>(p.out) + batch * 2 * offsets * tiles * c;
  T* row_out = out + (offset * tiles + column) * c;
  T* column_out = out + ((offsets + offset) * tiles + row) * c;
  if (offset == 0 && column < row) {
    // Offset 0 is symmetric: the tile across the diagonal does the work of both.
    const int thread = threadIdx.y * kSide + threadIdx.x;
    if (thread < kTile && i0 + thread < c) row_out[i0 + thread] = 0;
    if (thread < kTile && j0 + thread < c) column_out[j0 + thread] = 0;
    return;
  }
  const int dy = int((offset + p.kw - 1) / (2 * p.kw - 1));
  const int dx = int(offset - int64_t(dy) * (2 * p.kw - 1));
  const int first = dx < 0 ? -dx : 0, width = p.kw - (dx < 0 ? -dx : dx);
  const int64_t size = p.depth * c;
  const T* taps = static_cast<const T*>(p.taps) + batch * p.kh * p.kw * size;
  T gram[kEach][kEach] = {};
  for (int tap = 0; tap < (p.kh - dy) * width; ++tap) {
    const int x = tap / width * p.kw + first + tap % width;
    const T* at_x = taps + x * size;
    const T* at_y = taps + (x + dy * p.kw + dx) * size;
    for (int64_t n = 0; n < p.depth; n += kSlice) {
      fill<false, T>(left, [&](int k, int i) {
        return n + k < p.depth && i0 + i < c ? at_x[(n + k) * c + i0 + i] : T(0);
      });
      fill<false, T>(right, [&](int k, int j) {
        return n + k < p.depth && j0 + j < c ? at_y[(n + k) * c + j0 + j] : T(0);
      });
      __syncthreads();
      multiply<T>(left, right, gram);
      __syncthreads();
    }
  }
  const T* q = static_cast<const T*>(p.q) + batch * c;
  int8_t* signs = p.signs + batch * c * offsets * c;
  const bool mirrored = offset == 0 && column > row;
  T across[kEach] = {}, down[kEach] = {};
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
#pragma unroll
    for (int v = 0; v < kEach; ++v) {
      const int64_t i = i0 + threadIdx.y * kEach + u, j = j0 + threadIdx.x * kEach + v;
      if (i >= c || j >= c) continue;
      const T value = gram[u][v];
      const int8_t sign = int8_t((value > 0) - (value < 0));
      signs[(i * offsets + offset) * c + j] = sign;
      if (mirrored) signs[j * offsets * c + i] = sign;
      const T magnitude = value < 0 ? -value : value;
      across[u] += magnitude * q[j];
      down[v] += magnitude * q[i];
    }
  }
  if (offset == 0 && column == row) {  // the diagonal tile holds both of its halves
#pragma unroll
    for (int v = 0; v < kEach; ++v) down[v] = 0;
  }
  write_sums<T>(reduction, across, threadIdx.y, threadIdx.x, row_out, i0, c);
  write_sums<T>(reduction, down, threadIdx.x, threadIdx.y, column_out, j0, c);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gram_bound_backward_kernel(GramBoundParams p) {
  alignas(sizeof(Four<T>)) __shared__ Slice<T> left, right;
  const int64_t c = p.channels, columns = (c + kTile - 1) / kTile;
  const int64_t n0 = blockIdx.x / columns * kTile, i0 = blockIdx.x % columns * kTile;
  const int x = blockIdx.y;
  const int64_t batch = blockIdx.z;
  const int64_t line = ((int64_t(2 * p.kh - 1) * (2 * p.kw - 1) + 1) / 2) * c, size = p.depth * c;
  const T* taps = static_cast<const T*>(p.taps) + batch * p.kh * p.kw * size;
  const T* a = static_cast<const T*>(p.a) + batch * c;
  const T* q = static_cast<const T*>(p.q) + batch * c;
  const int8_t* signs = p.signs + batch * c * line;
  T sums[kEach][kEach] = {};
  for (int y = 0; y < p.kh * p.kw; ++y) {
    const int ahead = (y / p.kw - x / p.kw) * (2 * p.kw - 1) + y % p.kw - x % p.kw;
    const T* at_y = taps + y * size;
    // Behind x the correlation is the transpose of that at the opposite offset.
    const int8_t* plane = signs + (ahead < 0 ? -ahead : ahead) * c;
    for (int64_t j0 = 0; j0 < c; j0 += kSlice) {
      fill<true, T>(left, [&](int k, int n) {
        return n0 + n < p.depth && j0 + k < c ? at_y[(n0 + n) * c + j0 + k] : T(0);
      });
      const auto factor = [&](int64_t i, int64_t j, int64_t place) {
        if (i >= c || j >= c) return T(0);
        const int8_t sign = plane[place];
        const T weight = a[i] * q[j] + a[j] * q[i];
        return sign > 0 ? weight : sign < 0 ? -weight : T(0);
      };
      if (ahead >= 0) {
        fill<true, T>(right, [&](int k, int i) {
          return factor(i0 + i, j0 + k, (i0 + i) * line + j0 + k);
        });
      } else {
        fill<false, T>(right, [&](int k, int i) {
          return factor(i0 + i, j0 + k, (j0 + k) * line + i0 + i);
        });
      }
      __syncthreads();
      multiply<T>(left, right, sums);
      __syncthreads();
    }
  }
  T* out = static_cast<T*>(p.out) + (batch * p.kh * p.kw + x) * size;
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
#pragma unroll
    for (int v = 0; v < kEach; ++v) {
      const int64_t n = n0 + threadIdx.y * kEach + u, i = i0 + threadIdx.x * kEach + v;
      if (n < p.depth && i < c) out[n * c + i] = sums[u][v];
    }
  }
}

void check(const GramBoundParams& p, int64_t blocks) {
  if (blocks > INT32_MAX || p.offsets() > 65535 || p.batch > 65535) {
    throw std::invalid_argument("gram_bound: the kernel is too large for one launch");
  }
}

void check_launched() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error("gram_bound: CUDA error " + std::to_string(int(error)) + ": " +
                             cudaGetErrorString(error));
  }
}

}  // namespace

void gram_bound_forward_cuda(const GramBoundParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.channels + kTile - 1) / kTile;
  check(p, tiles * tiles);
  if (p.batch * tiles == 0) return;
  const auto kernel = p.is_double ? gram_bound_forward_kernel<double>
                                  : gram_bound_forward_kernel<float>;
  LIPFAST_LAUNCH(kernel, dim3(unsigned(tiles * tiles), unsigned(p.offsets()), unsigned(p.batch)),
                 dim3(kSide, kSide), stream, p);
  check_launched();
}

void gram_bound_backward_cuda(const GramBoundParams& p, cudaStream_t stream) {
  const int64_t columns = (p.channels + kTile - 1) / kTile, rows = (p.depth + kTile - 1) / kTile;
  check(p, rows * columns);
  if (p.batch * rows * columns == 0) return;
  const auto kernel = p.is_double ? gram_bound_backward_kernel<double>
                                  : gram_bound_backward_kernel<float>;
  LIPFAST_LAUNCH(kernel, dim3(unsigned(rows * columns), unsigned(p.kh * p.kw), unsigned(p.batch)),
                 dim3(kSide, kSide), stream, p);
  check_launched();
}

}  // namespace lipfast
