// csrc/polar.cu compiled by the host compiler, behind plain C functions for ctypes.
#include "polar.cu"

extern "C" void polar_on_cpu(bool forward, const float* x, const float* grad, float* w, float* out,
                             int64_t batch, int planes, int rows, int columns, int steps,
                             const double* schedule) {
  lipfast::PolarParams params{x, grad, w, out, batch, planes, rows, columns, steps, {}};
  if (forward) std::memcpy(params.schedule, schedule, sizeof(double) * 3 * steps);
  (forward ? lipfast::polar_forward_cuda : lipfast::polar_backward_cuda)(params, nullptr);
}

extern "C" int64_t polar_shared_bytes(int planes, int rows, int columns) {
  return lipfast::polar_shared_bytes(planes, rows, columns);
}
