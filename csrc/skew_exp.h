// skew_exp: a polynomial of a skew-symmetric convolution, all terms in one launch.
// Shared by the CUDA kernels (skew_exp.cu) and the bindings.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "maxmin.h"  // LIPFAST_HD

namespace lipfast {

constexpr int kSkewExpMaxTerms = 32;
constexpr int kSkewExpEach = 4;   // channels of a thread without tensor cores
constexpr int kSkewExpTile = 16;  // channels of a warp with them

// z_n = x, z_(k-1) = x + r_k L z_k, y = a0 z_0 (forward), or h = a0 x, out = h, and for k = 1..n
// t_k = r_k h, h = -L t_k, out += h (backward). Maps hold (batch, channels, h, w) elements in that
// order, or (batch, h, w, channels) when channels_last.
struct SkewExpParams {
  const void* x;     // forward: x; backward: dL/dy
  const void* taps;  // (kh, kw, padded, padded): tap, input, output channel, the rest 0; with
                     // tensor cores (kh, kw, padded / b, padded, b): b inputs together in 8 bytes
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
  DType dtype;        // not kFloat16
  bool tensor_cores;  // float32 in TF32, to which taps is rounded; always with bfloat16
  double a0;
  double ratios[kSkewExpMaxTerms];  // r_1, ..., r_n

  LIPFAST_HD int padded() const {
    const int group = tensor_cores ? kSkewExpTile : kSkewExpEach;
    return (channels + group - 1) / group * group;
  }
  LIPFAST_HD int positions() const { return height * width; }
  // Elements of a position in shared memory: an odd number of what a warp reads of it at once, so
  // that its positions lie in different banks.
  LIPFAST_HD int row() const {
    const int unit = !tensor_cores ? kSkewExpEach : dtype == DType::kFloat32 ? 8 : 16;
    return padded() + (padded() / unit % 2 ? 0 : unit);
  }
  // Elements of shared memory: a row of zeros for what lies outside the map, and two maps.
  LIPFAST_HD int64_t shared_elements() const { return (1 + 2 * int64_t(positions())) * row(); }
  // Behind them lies a table of 32 bits per position.
  LIPFAST_HD int64_t shared_bytes(int64_t element) const {
    return shared_elements() * element + 4 * int64_t(positions());
  }
};

inline int64_t skew_exp_shared_bytes(int channels, int height, int width, DType dtype,
                                     bool tensor_cores) {
  SkewExpParams p{};
  p.channels = channels, p.height = height, p.width = width;
  p.dtype = dtype, p.tensor_cores = tensor_cores;
  return p.shared_bytes(dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2);
}

void skew_exp_forward_cuda(const SkewExpParams& params, cudaStream_t stream);
void skew_exp_backward_cuda(const SkewExpParams& params, cudaStream_t stream);

}  // namespace lipfast
