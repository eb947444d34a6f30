// skew_exp on CUDA: a block holds the map of one image in shared memory through all terms and
// streams the taps, which all blocks share, from L2.
#include "cuda_on_cpu.h"

#include <stdexcept>
#include <string>

#include "skew_exp.h"
#include "skew_exp_tile.h"

namespace lipfast {
namespace {

template <bool kForward, typename Type>
__global__ void __launch_bounds__(kThreads) skew_exp_kernel(const SkewExpParams p) {
  using T = typename Type::Element;
  using Sum = typename Type::Sum;
  LIPFAST_DYNAMIC_SHARED(bytes);
  T* shared = reinterpret_cast<T*>(bytes);
  const int size = p.channels * p.positions(), row = p.row();
  const int64_t image = int64_t(blockIdx.x) * size, all = p.batch * size;
  const T* x = static_cast<const T*>(p.x) + image;
  T* out = static_cast<T*>(p.out) + image;
  T* terms = static_cast<T*>(p.terms);
  for (int i = threadIdx.x; i < int(p.shared_elements()); i += kThreads) {
    shared[i] = T{};
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
    shared[now + position * row + channel] = Type::factor(value);
    if (terms) terms[(kForward ? p.count - 1 : 0) * all + image + i] = value;
  }
  const int tiles = tiles_of<Type>(p);
  for (int step = 0; step < p.count; ++step) {
    __syncthreads();  // the map is complete, and what is overwritten now has been read
    for (int tile = threadIdx.x / kWarp; tile < tiles; tile += kThreads / kWarp) {
      convolve_tile<Type>(p, shared, now, table, tile, [&](int position, int channel, Sum sum) {
        if (position >= p.positions() || channel >= p.channels) return;
        const bool last = step == p.count - 1;
        const Sum ratio = Sum(p.ratios[kForward ? p.count - 1 - step : last ? 0 : step + 1]);
        const int i = p.channels_last ? position * p.channels + channel
                                      : channel * p.positions() + position;
        Sum value;
        if (kForward) {
          value = Type::load(x[i]) + ratio * sum;
          if (last) out[i] = Type::store(Sum(p.a0) * value);
        } else {
          out[i] = Type::store(Type::load(out[i]) - sum);
          value = -ratio * sum;
        }
        if (last) return;
        const T element = Type::store(value);
        shared[next + position * row + channel] = Type::factor(element);
        const int64_t term = (kForward ? p.count - 2 - step : step + 1) * all + image;
        if (terms) terms[term + i] = element;
      });
    }
    const int other = now;
    now = next;
    next = other;
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report this error again
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
  if (p.dtype == DType::kFloat64 && !p.tensor_cores) return launch<kForward, Float64>(p, stream);
  if (p.dtype == DType::kFloat32 && !p.tensor_cores) return launch<kForward, Float32>(p, stream);
  if (p.dtype == DType::kFloat32) return launch<kForward, TF32>(p, stream);
  if (p.dtype == DType::kBFloat16 && p.tensor_cores) return launch<kForward, BF16>(p, stream);
  throw std::invalid_argument("skew_exp: no kernel of this dtype");
}

}  // namespace

void skew_exp_forward_cuda(const SkewExpParams& p, cudaStream_t stream) {
  launch_dtype<true>(p, stream);
}

void skew_exp_backward_cuda(const SkewExpParams& p, cudaStream_t stream) {
  launch_dtype<false>(p, stream);
}

}  // namespace lipfast
