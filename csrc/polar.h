// polar: the polar factor of small matrices and its derivative, one block of threads per matrix.
// Shared by the CUDA kernels (polar.cu) and the bindings.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace lipfast {

constexpr int kPolarMaxRows = 64;
constexpr int kPolarMaxSteps = 16;   // of a schedule
// Added to H = (x x^H)^(1/2) where w has not converged, as a share of the root mean square singular
// value of x.
constexpr float kPolarShift = 0.1f;
constexpr int kPolarThreads = 256;   // of a block, 16 x 16

// Matrices are (batch, planes, rows, columns), contiguous, rows <= columns: one plane is real, two
// are the real and the imaginary part.
struct PolarParams {
  const float* x;
  const float* grad;  // backward only
  float* w;           // written by forward, read by backward
  float* out;         // forward: the residual, (batch,); backward: dL/dx
  int64_t batch;
  int planes;
  int rows;
  int columns;
  int steps;  // of the schedule in forward, of the conjugate gradients in backward
  double schedule[kPolarMaxSteps][3];  // forward: X <- a X + (b S + c S^2) X with S = X X^H
};

// Rows and columns of a tile that each thread computes: 16 threads a side cover all rows.
constexpr int polar_each(int rows) { return rows <= 16 ? 1 : rows <= 32 ? 2 : 4; }

// An odd distance between rows spreads a column over all banks of shared memory.
constexpr int polar_stride(int columns) { return columns | 1; }

// Numbers in shared memory: X, S, S^2 in forward; H, the direction, a buffer in backward; and one
// per thread for sums.
constexpr int64_t polar_forward_numbers(int planes, int rows, int columns) {
  return int64_t(planes) * rows * (polar_stride(columns) + 2 * polar_stride(rows)) + kPolarThreads;
}
constexpr int64_t polar_backward_numbers(int planes, int rows) {
  return int64_t(planes) * rows * (2 * polar_stride(rows) + 16 * polar_each(rows) + 2) +
         kPolarThreads;
}

// Bytes of shared memory that a block needs at most.
constexpr int64_t polar_shared_bytes(int planes, int rows, int columns) {
  const int64_t forward = polar_forward_numbers(planes, rows, columns);
  const int64_t backward = polar_backward_numbers(planes, rows);
  return (forward > backward ? forward : backward) * int64_t(sizeof(float));
}

void polar_forward_cuda(const PolarParams& params, cudaStream_t stream);
void polar_backward_cuda(const PolarParams& params, cudaStream_t stream);

// Bytes of shared memory that a block may have on this GPU.
int64_t polar_shared_limit(int device);

}  // namespace lipfast
