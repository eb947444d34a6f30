// skew_exp: a polynomial of a skew-symmetric convolution, all terms in one launch.
// Shared by the CUDA kernels (skew_exp.cu) and the bindings.
#pragma once

#include <cstdint>

#include "maxmin.h"  // DType

namespace lipfast {

constexpr int kSkewExpMaxTerms = 32;
constexpr int kSkewExpEach = 4;  // channels come in groups of so many

// z_n = x, z_(k-1) = x + r_k L z_k, y = a0 z_0 (forward), or h = a0 x, out = h, and for k = 1..n
// t_k = r_k h, h = -L t_k, out += h (backward). Maps hold (batch, channels, h, w) elements in that
// order, or (batch, h, w, channels) when channels_last.
struct SkewExpParams {
  const void* x;     // forward: x; backward: dL/dy
  const void* taps;  // (kh, kw, padded, padded): tap, input, output channel, the rest 0; double for
                     // float64, else float
  void* out;         // forward: y; backward: dL/dx
  void* terms;       // (count, batch, ...): z_1, ..., z_n or t_1, ..., t_n; may be null
  int64_t batch;
  int channels;
  int height;
  int width;
  int kh;
  int kw;
  int count;  // n, at least 1
  bool circular;
  bool channels_last;
  DType dtype;  // not kFloat16
  double a0;
  double ratios[kSkewExpMaxTerms];  // r_1, ..., r_n

  LIPFAST_HD int padded() const {
    return (channels + kSkewExpEach - 1) / kSkewExpEach * kSkewExpEach;
  }
  LIPFAST_HD int positions() const { return height * width; }
  // Elements of a position in shared memory: an odd number of groups, so that the positions that a
  // warp reads at once lie in different banks.
  LIPFAST_HD int row() const {
    return padded() + (padded() / kSkewExpEach % 2 ? 0 : kSkewExpEach);
  }
  // Elements of shared memory: a row of zeros for what lies outside the map, and two maps.
  LIPFAST_HD int64_t shared_elements() const { return (1 + 2 * int64_t(positions())) * row(); }
  // Behind them lies a table of 32 bits per position.
  LIPFAST_HD int64_t shared_bytes(int64_t element) const {
    return shared_elements() * element + 4 * int64_t(positions());
  }
};

inline int64_t skew_exp_shared_bytes(int channels, int height, int width, DType dtype) {
  SkewExpParams p{};
  p.channels = channels, p.height = height, p.width = width;
  return p.shared_bytes(dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2);
}

void skew_exp_forward_cuda(const SkewExpParams& params, cudaStream_t stream);
void skew_exp_backward_cuda(const SkewExpParams& params, cudaStream_t stream);

}  // namespace lipfast
