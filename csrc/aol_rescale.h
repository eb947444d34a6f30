// aol_rescale: a kernel scaled by r^(-1/2) along its input channels, cast and laid out in one pass.
// Shared by the CUDA kernels (aol_rescale.cu) and the bindings.
#pragma once

#include <cstdint>

#include "dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace lipfast {

// weight, r, grad_weight and partial are float, or double when is_double.
struct AolRescaleParams {
  const void* weight;  // (n, rows, channels, taps)
  const void* r;       // (n, channels)
  void* scaled;        // the scaled kernel, or its gradient: (n, rows, channels, taps) or, when
                       // channels_last, (n, rows, taps, channels), of this dtype
  void* grad_weight;   // as weight; backward only
  void* partial;       // (n, parts, channels), sums of grad_weight times weight over the rows of
                       // each part and all taps; backward only
  int64_t n;
  int64_t rows;
  int64_t channels;
  int64_t taps;
  bool channels_last;
  bool is_double;
  DType dtype;
};

constexpr int kAolRescaleRows = 8;  // of a part

void aol_rescale_forward_cuda(const AolRescaleParams& params, cudaStream_t stream);
void aol_rescale_backward_cuda(const AolRescaleParams& params, cudaStream_t stream);

}  // namespace lipfast
