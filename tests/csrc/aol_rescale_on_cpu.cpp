// csrc/aol_rescale.cu compiled by the host compiler, behind one plain C function for ctypes.
#include "aol_rescale.cu"

extern "C" void aol_rescale_on_cpu(bool forward, const void* weight, const void* r, void* scaled,
                                   void* grad_weight, void* partial, int64_t n, int64_t rows,
                                   int64_t channels, int64_t taps, bool channels_last,
                                   bool is_double, int dtype) {
  const lipfast::AolRescaleParams params{weight,   r,    scaled,        grad_weight, partial,
                                         n,        rows, channels,      taps,        channels_last,
                                         is_double, lipfast::DType(dtype)};
  (forward ? lipfast::aol_rescale_forward_cuda : lipfast::aol_rescale_backward_cuda)(params,
                                                                                      nullptr);
}
