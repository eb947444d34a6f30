// gram_bound: row sums of a convolution's Gram operator, and the signs that its derivative needs.
// Shared by the CUDA kernels (gram_bound.cu) and the bindings.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace lipfast {

// Offsets (dy, dx) of the half plane are numbered dy (2 kw - 1) + dx = 0, 1, ... Elements are
// float, or double when is_double.
struct GramBoundParams {
  const void* taps;  // (batch, kh, kw, depth, channels)
  const void* a;     // (batch, channels): dL/dr / q; backward only
  const void* q;     // (batch, channels)
  int8_t* signs;     // (batch, channels, offsets, channels); written by forward, read by backward
  void* out;         // forward: (batch, 2, offsets, tiles, channels), sums of q_j |G_delta|_ij over
                     // the columns and rows of each tile; backward: dL/dtaps
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

}  // namespace lipfast
