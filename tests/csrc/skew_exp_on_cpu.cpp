// csrc/skew_exp.cu compiled by the host compiler, behind one plain C function for ctypes.
#include "skew_exp.cu"

extern "C" int64_t skew_exp_on_cpu(bool forward, const void* x, const void* taps, void* out,
                                   void* terms, int64_t batch, int channels, int height, int width,
                                   int kh, int kw, int count, bool circular, bool channels_last,
                                   int dtype, bool tensor_cores, double a0,
                                   const double* ratios) {
  lipfast::SkewExpParams params{x,  taps, out,   terms,    batch,         channels,
                                height, width, kh, kw, count, circular, channels_last,
                                static_cast<lipfast::DType>(dtype), tensor_cores, a0, {}};
  for (int k = 0; k < count; ++k) params.ratios[k] = ratios[k];
  (forward ? lipfast::skew_exp_forward_cuda : lipfast::skew_exp_backward_cuda)(params, nullptr);
  return lipfast::skew_exp_shared_bytes(channels, height, width, params.dtype, tensor_cores);
}
