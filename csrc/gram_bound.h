// gram_bound: row sums of a convolution's Gram operator, and the signs that its derivative needs.
// Shared by the CUDA kernels (gram_bound.cu), the CPU code (gram_bound.cpp) and the bindings.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace lipfast {

// Offsets (dy, dx) of the half plane are numbered dy (2 kw - 1) + dx = 0, 1, ... Elements are
// float, or double when is_double.
struct GramBoundParams {
  const void* taps;  // CUDA: (batch, kh, kw, depth, channels); CPU: products of taps, forward only
  const void* a;     // (batch, channels): dL/dr / q; backward only
  const void* q;     // (batch, channels)
  int8_t* signs;     // (batch, channels, offsets, channels); written by forward, read by backward
  void* out;         // CUDA forward: (batch, 2, offsets, tiles, channels), sums of q_j |G_delta|_ij
                     // over the columns and rows of each tile; backward: dL/dtaps
  int64_t batch;
  int64_t channels;
  int64_t depth;
  int kh;
  int kw;
  bool is_double;

  int64_t offsets() const { return (int64_t(2 * kh - 1) * (2 * kw - 1) + 1) / 2; }
};

constexpr int kGramBoundTile = 64;  // channels of a tile

void gram_bound_forward_cuda(const GramBoundParams& params, cudaStream_t stream);
void gram_bound_backward_cuda(const GramBoundParams& params, cudaStream_t stream);

// The sums of products that gram_bound_forward_cpu starts from, as `taps`.
enum class GramBoundProducts : int {
  kAllTaps,  // (batch, kh kw channels, kh kw channels): w_x w_y^T for all taps x and y
  kRows,     // for each row of the kernel its part of that matrix from its own taps y on, in turn:
             // (batch, kw channels, (kh - row) kw channels)
  kSummed,   // (batch, channels, offsets, channels): the correlations
};

// Writes out = q_i r_i (batch, channels), and the signs.
void gram_bound_forward_cpu(const GramBoundParams& params, GramBoundProducts kind);
// Writes, from the signs, the factors S(d) of dL/dw_x = sum_y S(y - x) w_y: as a matrix,
// (batch, kh kw channels, kh kw channels), or (batch, channels, offsets, channels).
void gram_bound_backward_cpu(const GramBoundParams& params, bool matrix);

}  // namespace lipfast
