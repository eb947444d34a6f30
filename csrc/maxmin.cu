// maxmin on CUDA: each thread owns eight pairs, and so one byte of the mask; the threads after the
// last pair copy the odd channel. One read and one write per element.
#include "cuda_on_cpu.h"

#include <stdexcept>
#include <string>

#include "maxmin.h"

namespace lipfast {
namespace {

constexpr int kThreads = 256;
constexpr int kPairs = 8;

template <typename T>
struct alignas(sizeof(T) * kPairs >= 16 ? 16 : sizeof(T) * kPairs) Eight {
  T at[kPairs];
};

// Eight elements from an address aligned to 16 bytes, in loads and stores of 16 bytes each.
template <typename T>
__device__ __forceinline__ Eight<T> load(const T* from) {
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < int(sizeof(eight) / 16); ++i) {
    reinterpret_cast<uint4*>(&eight)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  return eight;
}
template <typename T>
__device__ __forceinline__ void store(T* to, const Eight<T>& eight) {
#pragma unroll
  for (int i = 0; i < int(sizeof(eight) / 16); ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&eight)[i];
  }
}

// Orders a pair and notes the swap in its bit (forward), or swaps it as its bit says (backward).
template <typename Type, typename T>
__device__ __forceinline__ void transform_pair(Type, T& a, T& b, unsigned& bits, int bit) {
  const T x = a, y = b;
  bits |= unsigned(order_pair(Type(), x, y, a, b)) << bit;
}
template <typename T>
__device__ __forceinline__ void transform_pair(Raw<T>, T& a, T& b, unsigned& bits, int bit) {
  const T x = a, y = b;
  const bool swap = bits >> bit & 1;
  a = swap ? y : x;
  b = swap ? x : y;
}

// Eight pairs that lie in one row, at aligned addresses.
template <typename Type, typename T>
__device__ __forceinline__ void transform_aligned(const T* x, T* y, const MaxMinParams& p,
                                                  unsigned& bits) {
  const int64_t second = p.channels_last ? kPairs : p.partner();
  Eight<T> a = load(x), b = load(x + second);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (p.channels_last) {  // a holds pairs 0 to 3, b pairs 4 to 7
      Eight<T>& half = i < kPairs / 2 ? a : b;
      const int at = 2 * i % kPairs;
      transform_pair(Type(), half.at[at], half.at[at + 1], bits, i);
    } else {
      transform_pair(Type(), a.at[i], b.at[i], bits, i);
    }
  }
  store(y, a);
  store(y + second, b);
}

template <bool kForward, bool kAligned, typename Type>
__global__ void __launch_bounds__(kThreads) maxmin_kernel(MaxMinParams p) {
  using T = typename Type::Element;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const int64_t pairs = p.pairs(), bytes = (pairs + kPairs - 1) / kPairs;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= bytes) {
    const int64_t single = thread - bytes;
    if (p.channels % 2 == 0 || single >= p.batch * p.spatial) return;
    const int64_t offset = p.last_channel_offset(single);
    y[offset] = x[offset];
    return;
  }
  const int64_t pair = thread * kPairs;
  unsigned bits = kForward ? 0 : p.mask[thread];
  if constexpr (kAligned) {
    // Channels last: an even number of them, so that all rows are one and offsets are 2 * pair.
    const int64_t offset = p.channels_last
                               ? 2 * pair
                               : p.row_offset(pair / p.spatial) + pair % p.spatial;
    transform_aligned<Type>(x + offset, y + offset, p, bits);
  } else {
    for (int i = 0; i < kPairs && pair + i < pairs; ++i) {
      const int64_t row = (pair + i) / p.row_pairs(), position = (pair + i) % p.row_pairs();
      const int64_t offset = p.row_offset(row) + position * p.step();
      T a = x[offset], b = x[offset + p.partner()];
      transform_pair(Type(), a, b, bits, i);
      y[offset] = a;
      y[offset + p.partner()] = b;
    }
  }
  if (kForward) p.mask[thread] = static_cast<uint8_t>(bits);
}

bool aligned(const MaxMinParams& p) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y);
  if (addresses % 16 != 0 || p.pairs() % kPairs != 0) return false;
  return p.channels_last ? p.channels % 2 == 0 : p.spatial % kPairs == 0;
}

template <bool kForward, typename Type>
void launch(const MaxMinParams& p, cudaStream_t stream) {
  const int64_t singles = p.channels % 2 == 0 ? 0 : p.batch * p.spatial;
  const int64_t threads = (p.pairs() + kPairs - 1) / kPairs + singles;
  if (threads == 0) return;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) throw std::invalid_argument("maxmin: the tensor is too large for one launch");
  const auto kernel = aligned(p) ? maxmin_kernel<kForward, true, Type>
                                : maxmin_kernel<kForward, false, Type>;
  LIPFAST_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, p);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error("maxmin: CUDA error " + std::to_string(int(error)) + ": " +
                             cudaGetErrorString(error));
  }
}

}  // namespace

void maxmin_forward_cuda(const MaxMinParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat64: return launch<true, Float<double>>(p, stream);
    case DType::kFloat32: return launch<true, Float<float>>(p, stream);
    case DType::kBFloat16: return launch<true, BFloat16>(p, stream);
    case DType::kFloat16: return launch<true, Float16>(p, stream);
  }
  throw std::invalid_argument("maxmin: unknown dtype");
}

void maxmin_backward_cuda(const MaxMinParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat64: return launch<false, Raw<uint64_t>>(p, stream);
    case DType::kFloat32: return launch<false, Raw<uint32_t>>(p, stream);
    case DType::kBFloat16:
    case DType::kFloat16: return launch<false, Raw<uint16_t>>(p, stream);
  }
  throw std::invalid_argument("maxmin: unknown dtype");
}

}  // namespace lipfast
