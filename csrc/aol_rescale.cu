// aol_rescale on CUDA: a block handles 64 channels, whose taps pass through shared memory 16 at a
// time, so that both memory formats are read and written along their own neighbours.
#include "cuda_on_cpu.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "aol_rescale.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace lipfast {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 64;
constexpr int kTaps = 16;

#if defined(__CUDACC__)
using Half = __half;
#else
using Half = _Float16;
#endif

// Short dtypes convert from and to float only.
template <typename S>
using Wide = std::conditional_t<(sizeof(S) < 4), float, S>;

template <typename T>
__device__ __forceinline__ T factor(const AolRescaleParams& p, int64_t n, int64_t channel) {
  const T r = static_cast<const T*>(p.r)[n * p.channels + channel];
  return r > 0 ? 1 / sqrt(r) : T(0);
}

// Calls body(channel, tap) for all of the tile, neighbouring threads along the channels, or along
// the taps.
template <bool kAlongChannels, typename Body>
__device__ __forceinline__ void for_each(int channels, int taps, Body body) {
  for (int at = threadIdx.x; at < channels * taps; at += kThreads) {
    const int width = kAlongChannels ? channels : taps;
    kAlongChannels ? body(at % width, at / width) : body(at / width, at % width);
  }
}

// Where the block's tile begins in the kernel, and how much of it there is.
struct Tile {
  __device__ Tile(const AolRescaleParams& p, int64_t line, int64_t first, int64_t tap)
      : channels(int(first + kChannels < p.channels ? kChannels : p.channels - first)),
        taps(int(tap + kTaps < p.taps ? kTaps : p.taps - tap)),
        in_order(line * p.channels * p.taps + first * p.taps + tap),
        channels_last(line * p.channels * p.taps + tap * p.channels + first) {}
  int channels, taps;
  int64_t in_order, channels_last;
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) aol_rescale_forward_kernel(AolRescaleParams p) {
  __shared__ T values[kTaps][kChannels + 1];
  __shared__ T factors[kChannels];
  const int64_t blocks = (p.channels + kChannels - 1) / kChannels;
  const int64_t line = blockIdx.x / blocks, first = blockIdx.x % blocks * kChannels;
  const int64_t channel = first + threadIdx.x;
  if (threadIdx.x < kChannels && channel < p.channels) {
    factors[threadIdx.x] = factor<T>(p, line / p.rows, channel);
  }
  const T* weight = static_cast<const T*>(p.weight);
  S* out = static_cast<S*>(p.scaled);
  for (int64_t tap = 0; tap < p.taps; tap += kTaps) {
    const Tile tile(p, line, first, tap);
    __syncthreads();
    for_each<false>(tile.channels, tile.taps, [&](int c, int t) {
      const int64_t place = tile.in_order + c * p.taps + t;
      const T value = weight[place] * factors[c];
      if (p.channels_last) values[t][c] = value;
      else out[place] = S(Wide<S>(value));
    });
    if (!p.channels_last) continue;
    __syncthreads();
    for_each<true>(tile.channels, tile.taps, [&](int c, int t) {
      out[tile.channels_last + t * p.channels + c] = S(Wide<S>(values[t][c]));
    });
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) aol_rescale_backward_kernel(AolRescaleParams p) {
  __shared__ T values[kTaps][kChannels + 1];
  __shared__ T factors[kChannels];
  const int64_t blocks = (p.channels + kChannels - 1) / kChannels;
  const int64_t parts = (p.rows + kAolRescaleRows - 1) / kAolRescaleRows;
  const int64_t task = blockIdx.x / blocks, first = blockIdx.x % blocks * kChannels;
  const int64_t n = task / parts, row = task % parts * kAolRescaleRows;
  const int64_t end = row + kAolRescaleRows < p.rows ? row + kAolRescaleRows : p.rows;
  const int64_t channel = first + threadIdx.x;
  const bool sums_up = threadIdx.x < kChannels && channel < p.channels;
  if (sums_up) factors[threadIdx.x] = factor<T>(p, n, channel);
  const T* weight = static_cast<const T*>(p.weight);
  const S* grad = static_cast<const S*>(p.scaled);
  T* out = static_cast<T*>(p.grad_weight);
  T sum = 0;
  for (int64_t line = n * p.rows + row; line < n * p.rows + end; ++line) {
    for (int64_t tap = 0; tap < p.taps; tap += kTaps) {
      const Tile tile(p, line, first, tap);
      __syncthreads();
      if (p.channels_last) {
        for_each<true>(tile.channels, tile.taps, [&](int c, int t) {
          values[t][c] = T(Wide<S>(grad[tile.channels_last + t * p.channels + c]));
        });
        __syncthreads();
      }
      for_each<false>(tile.channels, tile.taps, [&](int c, int t) {
        const int64_t place = tile.in_order + c * p.taps + t;
        const T g = p.channels_last ? values[t][c] : T(Wide<S>(grad[place]));
        out[place] = g * factors[c];
        values[t][c] = g * factors[c] * weight[place];
      });
      __syncthreads();
      if (!sums_up) continue;
      for (int t = 0; t < tile.taps; ++t) sum += values[t][threadIdx.x];
    }
  }
  if (sums_up) static_cast<T*>(p.partial)[task * p.channels + channel] = sum;
}

using Kernel = void (*)(AolRescaleParams);

template <typename T>
Kernel choose(bool forward, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return forward ? aol_rescale_forward_kernel<T, double> : aol_rescale_backward_kernel<T, double>;
    case DType::kFloat32:
      return forward ? aol_rescale_forward_kernel<T, float> : aol_rescale_backward_kernel<T, float>;
    case DType::kBFloat16:
      return forward ? aol_rescale_forward_kernel<T, RoundedBFloat16>
                     : aol_rescale_backward_kernel<T, RoundedBFloat16>;
    case DType::kFloat16:
      return forward ? aol_rescale_forward_kernel<T, Half> : aol_rescale_backward_kernel<T, Half>;
  }
  throw std::invalid_argument("aol_rescale: unknown dtype");
}

void launch(bool forward, const AolRescaleParams& p, int64_t lines, cudaStream_t stream) {
  const int64_t blocks = lines * ((p.channels + kChannels - 1) / kChannels);
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("aol_rescale: the kernel is too large for one launch");
  }
  if (blocks == 0) return;
  const Kernel kernel = p.is_double ? choose<double>(forward, p.dtype) : choose<float>(forward, p.dtype);
  LIPFAST_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kThreads), stream, p);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error("aol_rescale: CUDA error " + std::to_string(int(error)) + ": " +
                             cudaGetErrorString(error));
  }
}

}  // namespace

void aol_rescale_forward_cuda(const AolRescaleParams& p, cudaStream_t stream) {
  launch(true, p, p.n * p.rows, stream);
}

void aol_rescale_backward_cuda(const AolRescaleParams& p, cudaStream_t stream) {
  launch(false, p, p.n * ((p.rows + kAolRescaleRows - 1) / kAolRescaleRows), stream);
}

}  // namespace lipfast
