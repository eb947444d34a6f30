// The convolution in skew_exp.cu: a warp computes one tile of positions and channels from a map in
// shared memory. Without tensor cores a thread sums up four output channels at some positions; the
// lanes of a warp share inputs along the channels and taps along the positions. With them a warp
// computes 64 positions x 16 channels.
#pragma once

#include <cstdint>
#include <cstring>

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
// takes two registers), and what an element becomes as a factor of a product.
template <typename T, int kCount>
struct Plain {
  using Element = T;
  using Sum = T;
  static constexpr bool kTensorCores = false;
  static constexpr int kPositions = kCount;
  static __device__ __forceinline__ T load(T value) { return value; }
  static __device__ __forceinline__ T store(T value) { return value; }
  static __device__ __forceinline__ T factor(T value) { return value; }
};
using Float64 = Plain<double, 4>;
using Float32 = Plain<float, 8>;
struct TF32 : Float32 {
  static constexpr bool kTensorCores = true;
  static constexpr int kTogether = 2;  // elements of 8 bytes
  static __device__ __forceinline__ float factor(float value) {  // to nearest, ties away from 0
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    bits = (bits + 0x1000) & 0xffffe000;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return value == value ? result : value;
  }
};
struct BF16 {
  using Element = BFloat16Bits;
  using Sum = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kTogether = 4;
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
  static __device__ __forceinline__ BFloat16Bits factor(BFloat16Bits value) { return value; }
};

template <typename T>
struct alignas(sizeof(T) * kEach > 16 ? 16 : sizeof(T) * kEach) Four {
  T at[kEach];
};

__device__ __forceinline__ int wrap(int i, int n) {
  const int rest = i % n;
  return rest < 0 ? rest + n : rest;
}

// Where the neighbour of a position at (dy, dx) begins in shared memory: 0 outside the map.
__device__ __forceinline__ int neighbour(const SkewExpParams& p, const int* table, int map,
                                         int position, int dy, int dx) {
  const bool exists = position < p.positions();
  const int at = table[exists ? position : 0];
  int y = (at >> 16) + dy, x = (at & 0xffff) + dx;
  if (p.circular) y = wrap(y, p.height), x = wrap(x, p.width);
  const bool inside = exists && y >= 0 && y < p.height && x >= 0 && x < p.width;
  return inside ? map + (y * p.width + x) * p.row() : 0;
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
  const int padded = p.padded();
  const Sum* taps = static_cast<const Sum*>(p.taps) +
                    (place.channel < padded ? place.channel : 0);
  for (int tap = 0; tap < p.kh * p.kw; ++tap) {
    const int dy = tap / p.kw - p.kh / 2, dx = tap % p.kw - p.kw / 2;
    int from[kPositions];
#pragma unroll
    for (int j = 0; j < kPositions; ++j) {
      from[j] = neighbour(p, table, map, place.position(j), dy, dx);
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

// Tensor cores: a tile is kRows rows of eight positions x kColumns columns of eight channels. Lane
// 4 g + t holds of each pair of rows and each column the sums of positions g and 8 + g and channels
// 2 t and 2 t + 1; its factors are the t-th 8 bytes of the inputs, in one order on both sides.
constexpr int kRows = 8;
constexpr int kColumns = 2;
static_assert(8 * kColumns == kSkewExpTile, "a tile reads no taps beyond the last channel");

#if defined(__CUDACC__)

struct alignas(8) Pair {
  uint32_t at[2];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ void multiply(TF32, float (&sums)[4], Pair low, Pair high, Pair taps) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(low.at[0]), "r"(high.at[0]), "r"(low.at[1]), "r"(high.at[1]), "r"(taps.at[0]),
        "r"(taps.at[1]));
}
__device__ __forceinline__ void multiply(BF16, float (&sums)[4], Pair low, Pair high, Pair taps) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(low.at[0]), "r"(high.at[0]), "r"(low.at[1]), "r"(high.at[1]), "r"(taps.at[0]),
        "r"(taps.at[1]));
}
#else  // can_run in lipfast/ops/skew_exp_cuda.py refuses: these instructions do not exist
template <typename Type>
__device__ __forceinline__ void multiply(Type, float (&)[4], Pair, Pair, Pair) {
  __trap();
}
#endif

template <typename Type, typename T>
__device__ __forceinline__ void multiply_slice(const T* inputs, const int (&from)[kRows],
                                               const T* taps, int padded,
                                               float (&sums)[kRows / 2][kColumns][4]) {
  constexpr int b = Type::kTogether;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  Pair factor[kColumns];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    factor[n] = *reinterpret_cast<const Pair*>(taps + (t * padded + 8 * n + g) * b);
  }
#pragma unroll
  for (int m = 0; m < kRows / 2; ++m) {
    const Pair low = *reinterpret_cast<const Pair*>(inputs + from[2 * m] + b * t);
    const Pair high = *reinterpret_cast<const Pair*>(inputs + from[2 * m + 1] + b * t);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) multiply(Type(), sums[m][n], low, high, factor[n]);
  }
}

#else  // each lane computes its own sums

template <typename Type, typename T>
void multiply_slice(const T* inputs, const int (&from)[kRows], const T* taps, int padded,
                    float (&sums)[kRows / 2][kColumns][4]) {
  constexpr int b = Type::kTogether;
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      for (int v = 0; v < 2; ++v) {
        const T* column = taps + (8 * n + threadIdx.x % 4 * 2 + v) * b;
        for (int i = 0; i < 4 * b; ++i) {
          sums[m / 2][n][m % 2 * 2 + v] += Type::load(inputs[from[m] + i]) *
                                           Type::load(column[i / b * padded * b + i % b]);
        }
      }
    }
  }
}

#endif

// Passes the sums of one tile of a warp to finish(position, channel, sum).
template <typename Type, typename Finish>
__device__ __forceinline__ void convolve_tile(const SkewExpParams& p,
                                              const typename Type::Element* shared, int map,
                                              const int* table, int tile, Finish finish) {
  if constexpr (Type::kTensorCores) {
    const int padded = p.padded(), columns = padded / (8 * kColumns);
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int channel = tile % columns * 8 * kColumns, first = tile / columns * 8 * kRows + g;
    const auto* taps = static_cast<const typename Type::Element*>(p.taps) + channel * Type::kTogether;
    float sums[kRows / 2][kColumns][4] = {};
    for (int tap = 0; tap < p.kh * p.kw; ++tap) {
      const int dy = tap / p.kw - p.kh / 2, dx = tap % p.kw - p.kw / 2;
      int from[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) from[m] = neighbour(p, table, map, first + 8 * m, dy, dx);
      constexpr int kSlice = 4 * Type::kTogether;
#pragma unroll 2
      for (int i = 0; i < padded; i += kSlice, taps += kSlice * padded) {
        multiply_slice<Type>(shared + i, from, taps, padded, sums);
      }
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          finish(first + 8 * m, channel + 8 * n + 2 * t + v, sums[m / 2][n][m % 2 * 2 + v]);
        }
      }
    }
  } else {
    constexpr int kPositions = Type::kPositions;
    const Place<kPositions> place(p, tile);
    typename Type::Sum sums[kPositions][kEach] = {};
    convolve<Type, kPositions>(p, shared, map, table, place, sums);
#pragma unroll
    for (int j = 0; j < kPositions; ++j) {
#pragma unroll
      for (int v = 0; v < kEach; ++v) finish(place.position(j), place.channel + v, sums[j][v]);
    }
  }
}

template <typename Type>
__device__ __forceinline__ int tiles_of(const SkewExpParams& p) {
  if constexpr (Type::kTensorCores) {
    return p.padded() / (8 * kColumns) * ((p.positions() + 8 * kRows - 1) / (8 * kRows));
  } else {
    return Place<Type::kPositions>::tiles(p);
  }
}

}  // namespace
}  // namespace lipfast
