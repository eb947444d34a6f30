// csrc/maxmin.cu compiled by the host compiler, behind plain C functions for ctypes.
#include "maxmin.cu"

namespace {

__global__ void rotate_kernel(const int* in, int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  const int from = values[(threadIdx.x + 1) % blockDim.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = from;
}

}  // namespace

extern "C" {

void maxmin_on_cpu(bool forward, const void* x, void* y, uint8_t* mask, int64_t batch,
                   int64_t channels, int64_t spatial, bool channels_last, int dtype) {
  const lipfast::MaxMinParams params{x,       y,       mask,          batch,
                                     channels, spatial, channels_last, lipfast::DType(dtype)};
  (forward ? lipfast::maxmin_forward_cuda : lipfast::maxmin_backward_cuda)(params, nullptr);
}

// Each of the blocks rotates its 64 numbers by one, through shared memory.
void rotate_on_cpu(const int* in, int* out, unsigned blocks) {
  LIPFAST_LAUNCH(rotate_kernel, dim3(blocks), dim3(64), nullptr, in, out);
}

}  // extern "C"
