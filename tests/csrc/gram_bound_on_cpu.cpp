// csrc/gram_bound.cu compiled by the host compiler, behind one plain C function for ctypes.
#include "gram_bound.cu"

extern "C" void gram_bound_on_cpu(bool forward, const void* taps, const void* a, const void* q,
                                  int8_t* signs, void* out, int64_t batch, int64_t channels,
                                  int64_t depth, int kh, int kw, bool is_double) {
  const lipfast::GramBoundParams params{taps,     a,     q,  signs, out,      batch,
                                        channels, depth, kh, kw,    is_double};
  (forward ? lipfast::gram_bound_forward_cuda : lipfast::gram_bound_backward_cuda)(params, nullptr);
}
