// skew_exp on CUDA: a block holds the map of one image in shared memory through all terms and
// streams the taps, which all blocks share, from L2. A thread sums up four output channels at some
// positions; the lanes of a warp share inputs along the channels and taps along the positions.
#include "cuda_on_cpu.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "skew_exp.h"

namespace lipfast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;
constexpr int kEach = kSkewExpEach;

struct BFloat16Bits {
  uint16_t bits;
};

// How an element is held (Element), what it is summed up in (Sum), positions of a thread (a double
// takes two registers).
struct Float64 {
  using Element = double;
  using Sum = double;
  static constexpr int kPositions = 4;
  static __device__ __forceinline__ double load(double value) { return value; }
  static __device__ __forceinline__ double store(double value) { return value; }
};
struct Float32 {
  using Element = float;
  using Sum = float;
  static constexpr int kPositions = 8;
  static __device__ __forceinline__ float load(float value) { return value; }
  static __device__ __forceinline__ float store(float value) { return value; }
};
struct BF16 {
  using Element = BFloat16Bits;
  using Sum = float;
  static constexpr int kPositions = 8;
  static __device__ __forceinline__ float load(BFloat16Bits value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
  }
  static __device__ __forceinline__ BFloat16Bits store(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if (value != value) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

template <typename T>
struct alignas(sizeof(T) * kEach > 16 ? 16 : sizeof(T) * kEach) Four {
  T at[kEach];
};

__device__ __forceinline__ int wrap(int i, int n) {
  const int rest = i % n;
  return rest < 0 ? rest + n : rest;
}

// The positions and channels of one thread in one tile of a warp.
template <int kPositions>
struct Place {
  int channel;  // the first of kEach
  int first;    // position
  int step;     // between positions

  __device__ __forceinline__ Place(const SkewExpParams& p, int tile) {
    const int lane = threadIdx.x % kWarp, across = p.channels <= 4 * kEach ? 4 : 8;
    const int columns = (p.padded() + across * kEach - 1) / (across * kEach);
    step = kWarp / across;
    channel = (tile % columns * across + lane % across) * kEach;
    first = tile / columns * step * kPositions + lane / across;
  }
  __device__ __forceinline__ int position(int j) const { return first + j * step; }
  static __device__ __forceinline__ int tiles(const SkewExpParams& p) {
    const int across = p.channels <= 4 * kEach ? 4 : 8, down = kWarp / across * kPositions;
    return (p.padded() + across * kEach - 1) / (across * kEach) *
           ((p.positions() + down - 1) / down);
  }
};

// Sums of a convolution of the map at shared + map with p.taps.
template <typename Type, int kPositions>
__device__ __forceinline__ void convolve(const SkewExpParams& p,
                                         const typename Type::Element* shared, int map,
                                         const int* table,
                                         const Place<kPositions>& place,
                                         typename Type::Sum (&sums)[kPositions][kEach]) {
  using Sum = typename Type::Sum;
  const int padded = p.padded(), row = p.row();
  const Sum* taps = static_cast<const Sum*>(p.taps) +
                    (place.channel < padded ? place.channel : 0);
  for (int tap = 0; tap < p.kh * p.kw; ++tap) {
    const int dy = tap / p.kw - p.kh / 2, dx = tap % p.kw - p.kw / 2;
    int from[kPositions];
#pragma unroll
    for (int j = 0; j < kPositions; ++j) {
      const bool exists = place.position(j) < p.positions();
      const int at = table[exists ? place.position(j) : 0];
      int y = (at >> 16) + dy, x = (at & 0xffff) + dx;
      if (p.circular) y = wrap(y, p.height), x = wrap(x, p.width);
      const bool inside = exists && y >= 0 && y < p.height && x >= 0 && x < p.width;
      from[j] = inside ? map + (y * p.width + x) * row : 0;
    }
    for (int i = 0; i < padded; i += kEach) {
      Four<Sum> factor[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k, taps += padded) {
        factor[k] = *reinterpret_cast<const Four<Sum>*>(taps);
      }
#pragma unroll
      for (int j = 0; j < kPositions; ++j) {
        const auto z =
            *reinterpret_cast<const Four<typename Type::Element>*>(shared + from[j] + i);
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
#pragma unroll
          for (int v = 0; v < kEach; ++v) sums[j][v] += Type::load(z.at[k]) * factor[k].at[v];
        }
      }
    }
  }
}

template <bool kForward, typename Type>
__global__ void __launch_bounds__(kThreads) skew_exp_kernel(const SkewExpParams p) {
  using T = typename Type::Element;
  using Sum = typename Type::Sum;
  constexpr int kPositions = Type::kPositions;
  LIPFAST_DYNAMIC_SHARED(bytes);
  T* shared = reinterpret_cast<T*>(bytes);
  const int size = p.channels * p.positions(), row = p.row();
  const int64_t image = int64_t(blockIdx.x) * size, all = p.batch * size;
  const T* x = static_cast<const T*>(p.x) + image;
  T* out = static_cast<T*>(p.out) + image;
  T* terms = static_cast<T*>(p.terms);
  for (int i = threadIdx.x; i < int(p.shared_elements()); i += kThreads) {
    shared[i] = Type::store(0);
  }
  int* table = reinterpret_cast<int*>(shared + p.shared_elements());  // row and column
  for (int i = threadIdx.x; i < p.positions(); i += kThreads) {
    table[i] = i / p.width << 16 | i % p.width;
  }
  __syncthreads();
  int now = row, next = (1 + p.positions()) * row;  // behind the row of zeros
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int position = p.channels_last ? i / p.channels : i % p.positions();
    const int channel = p.channels_last ? i % p.channels : i / p.positions();
    T value = x[i];
    if (!kForward) {
      const Sum h = Sum(p.a0) * Type::load(value);
      out[i] = Type::store(h);
      value = Type::store(Sum(p.ratios[0]) * h);
    }
    shared[now + position * row + channel] = value;
    if (terms) terms[(kForward ? p.count - 1 : 0) * all + image + i] = value;
  }
  const int tiles = Place<kPositions>::tiles(p);
  for (int step = 0; step < p.count; ++step) {
    __syncthreads();  // the map is complete, and what is overwritten now has been read
    const bool last = step == p.count - 1;
    for (int tile = threadIdx.x / kWarp; tile < tiles; tile += kThreads / kWarp) {
      const Place<kPositions> place(p, tile);
      Sum sums[kPositions][kEach] = {};
      convolve<Type, kPositions>(p, shared, now, table, place, sums);
      const Sum ratio = Sum(p.ratios[kForward ? p.count - 1 - step : last ? 0 : step + 1]);
      const int64_t term = (kForward ? p.count - 2 - step : step + 1) * all + image;
#pragma unroll
      for (int j = 0; j < kPositions; ++j) {
        const int position = place.position(j);
        if (position >= p.positions()) continue;
#pragma unroll
        for (int v = 0; v < kEach; ++v) {
          const int channel = place.channel + v;
          if (channel >= p.channels) continue;
          const int i = p.channels_last ? position * p.channels + channel
                                        : channel * p.positions() + position;
          Sum value;
          if (kForward) {
            value = Type::load(x[i]) + ratio * sums[j][v];
            if (last) out[i] = Type::store(Sum(p.a0) * value);
          } else {
            out[i] = Type::store(Type::load(out[i]) - sums[j][v]);
            value = -ratio * sums[j][v];
          }
          if (last) continue;
          shared[next + position * row + channel] = Type::store(value);
          if (terms) terms[term + i] = Type::store(value);
        }
      }
    }
    const int other = now;
    now = next;
    next = other;
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error("skew_exp: CUDA error " + std::to_string(int(error)) + ": " +
                             cudaGetErrorString(error));
  }
}

template <bool kForward, typename Type>
void launch(const SkewExpParams& p, cudaStream_t stream) {
  if (p.batch * p.channels * p.positions() == 0) return;
  if (p.batch > INT32_MAX || p.height > INT16_MAX || p.width > UINT16_MAX) {
    throw std::invalid_argument("skew_exp: the tensor is too large for one launch");
  }
  const int bytes = int(p.shared_bytes(sizeof(typename Type::Element)));
  const auto kernel = skew_exp_kernel<kForward, Type>;
  check(lipfast_allow_shared(kernel, bytes));
  LIPFAST_LAUNCH_SHARED(kernel, dim3(unsigned(p.batch)), dim3(kThreads), bytes, stream, p);
  check(cudaGetLastError());
}

template <bool kForward>
void launch_dtype(const SkewExpParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat64: return launch<kForward, Float64>(p, stream);
    case DType::kFloat32: return launch<kForward, Float32>(p, stream);
    case DType::kBFloat16: return launch<kForward, BF16>(p, stream);
    case DType::kFloat16: break;
  }
  throw std::invalid_argument("skew_exp: dtype must be float64, float32 or bfloat16");
}

}  // namespace

void skew_exp_forward_cuda(const SkewExpParams& p, cudaStream_t stream) {
  launch_dtype<true>(p, stream);
}

void skew_exp_backward_cuda(const SkewExpParams& p, cudaStream_t stream) {
  launch_dtype<false>(p, stream);
}

}  // namespace lipfast
