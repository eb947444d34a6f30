// aol_rescale: a kernel scaled by r^(-1/2) along its input channels, cast and laid out in one pass.
// Shared by the CPU kernels (aol_rescale.cpp), the CUDA kernels (aol_rescale.cu) and the bindings.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__CUDACC__)
#define LIPFAST_BOTH __host__ __device__
#else
#define LIPFAST_BOTH
#endif

typedef struct CUstream_st* cudaStream_t;

namespace lipfast {

// weight, r, grad_weight and partial are float, or double when is_double.
struct AolRescaleParams {
  const void* weight;  // (n, rows, channels, taps)
  const void* r;       // (n, channels)
  void* scaled;        // the scaled kernel, or its gradient: (n, rows, channels, taps) or, when
                       // channels_last, (n, rows, taps, channels), of this dtype
  void* grad_weight;   // as weight; backward only
  void* partial;       // CUDA backward: (n, parts, channels), sums of grad_weight times weight over
                       // the rows of each part and all taps; CPU backward: (n, channels), dL/dr
  int64_t n;
  int64_t rows;
  int64_t channels;
  int64_t taps;
  bool channels_last;
  bool is_double;
  DType dtype;
};

constexpr int kAolRescaleRows = 8;  // of a part

void aol_rescale_forward_cpu(const AolRescaleParams& params);
void aol_rescale_backward_cpu(const AolRescaleParams& params);
void aol_rescale_forward_cuda(const AolRescaleParams& params, cudaStream_t stream);
void aol_rescale_backward_cuda(const AolRescaleParams& params, cudaStream_t stream);

// bfloat16 by its bits: the upper half of a float, rounded to nearest, ties to even.
struct RoundedBFloat16 {
  RoundedBFloat16() = default;
  LIPFAST_BOTH explicit RoundedBFloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof(wide));
    const uint32_t rounded = wide + 0x7fff + (wide >> 16 & 1);
    bits = value == value ? uint16_t(rounded >> 16) : uint16_t(0x7fff);
  }
  LIPFAST_BOTH explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
  }
  uint16_t bits;
};

}  // namespace lipfast
