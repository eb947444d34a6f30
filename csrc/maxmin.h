// maxmin: (max, min) of neighbouring channels, and one bit per pair for the way back.
// Shared by the CPU kernels (maxmin.cpp), the CUDA kernels (maxmin.cu) and the bindings.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__CUDACC__)
#define LIPFAST_HD __host__ __device__ __forceinline__
#else
#define LIPFAST_HD inline
#endif

typedef struct CUstream_st* cudaStream_t;

namespace lipfast {

// x and y hold (batch, channels, spatial) elements, or (batch, spatial, channels) when
// channels_last. Pairs are numbered in that same memory order, and bit j % 8 of mask[j / 8] says
// that pair j is swapped. With an odd number of channels the last one is copied.
struct MaxMinParams {
  const void* x;
  void* y;
  uint8_t* mask;  // written by forward, read by backward
  int64_t batch;
  int64_t channels;
  int64_t spatial;
  bool channels_last;
  DType dtype;

  LIPFAST_HD int64_t pairs() const { return batch * (channels / 2) * spatial; }
  // A row is a run of pairs whose addresses advance evenly.
  LIPFAST_HD int64_t row_pairs() const { return channels_last ? channels / 2 : spatial; }
  // Between the two elements of a pair, and between neighbouring pairs of a row.
  LIPFAST_HD int64_t partner() const { return channels_last ? 1 : spatial; }
  LIPFAST_HD int64_t step() const { return channels_last ? 2 : 1; }
  // Offset of the first element of a row.
  LIPFAST_HD int64_t row_offset(int64_t row) const {
    if (channels_last) return row * channels;
    const int64_t half = channels / 2;
    return (row / half * channels + row % half * 2) * spatial;
  }
  // Offset of element i of the last channel, 0 <= i < batch * spatial.
  LIPFAST_HD int64_t last_channel_offset(int64_t i) const {
    if (channels_last) return (i + 1) * channels - 1;
    return (i / spatial * channels + channels - 1) * spatial + i % spatial;
  }
};

void maxmin_forward_cpu(const MaxMinParams& params);
void maxmin_backward_cpu(const MaxMinParams& params);
void maxmin_forward_cuda(const MaxMinParams& params, cudaStream_t stream);
void maxmin_backward_cuda(const MaxMinParams& params, cudaStream_t stream);

// How the elements of a dtype are held and compared. bfloat16 and float16 are handled by their bits:
// as integers they order like the numbers once the sign is folded in, which needs no conversion and
// no header of the CUDA toolkit. Raw is for the backward pass, which only moves elements.
template <typename T>
struct Float {
  using Element = T;
};
template <int kInfinity>
struct Half {
  using Element = uint16_t;
};
using BFloat16 = Half<0x7f80>;
using Float16 = Half<0x7c00>;
template <typename T>
struct Raw {
  using Element = T;
};

// The (max, min) of one pair, NaN in both if either is NaN; true if they were swapped.
template <typename T>
LIPFAST_HD bool order_pair(Float<T>, T a, T b, T& larger, T& smaller) {
  const bool swap = b > a;
  larger = b != b ? b : swap ? b : a;
  smaller = a != a ? a : swap ? a : b;
  return swap;
}
template <int kInfinity>
LIPFAST_HD bool order_pair(Half<kInfinity>, uint16_t a, uint16_t b, uint16_t& larger,
                           uint16_t& smaller) {
  const int16_t magnitude_a = a & 0x7fff, sign_a = int16_t(a) >> 15;
  const int16_t magnitude_b = b & 0x7fff, sign_b = int16_t(b) >> 15;
  const int16_t order_a = (magnitude_a ^ sign_a) - sign_a;
  const int16_t order_b = (magnitude_b ^ sign_b) - sign_b;
  const bool nan_a = magnitude_a > int16_t(kInfinity), nan_b = magnitude_b > int16_t(kInfinity);
  const bool swap = (order_b > order_a) & !nan_a & !nan_b;
  larger = (swap | nan_b) ? b : a;
  smaller = (swap | nan_a) ? a : b;
  return swap;
}

}  // namespace lipfast
