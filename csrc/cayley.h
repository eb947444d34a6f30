// cayley: inverses of the Cayley transform and its derivative, for batches of square matrices.
#pragma once

#include <cstdint>

namespace lipfast {

// Matrices (batch, parts, rows, n) by rows: parts is 1 for real ones, 2 for real parts before
// imaginary parts. Elements are float, or double when is_double.
struct CayleyParams {
  const void* matrix;  // forward: [U; V], rows >= n; backward: W = 2 Z - I, rows = n
  const void* other;   // forward: V^H V (batch, parts, n, n), or null; backward: dL/dW
  void* out;           // forward: 2 Z in the first n rows of (batch, parts, rows, n);
                       // backward: dL/dU
  int64_t batch;
  int64_t rows;
  int64_t n;
  int parts;
  bool is_double;
};

// 2 Z = 2 (I + U - U^H + V^H V)^(-1)
void cayley_forward_cpu(const CayleyParams& params);
// dL/dU = (T^H - T) / 2, T = (I + W)^H dL/dW (I + W)^H
void cayley_backward_cpu(const CayleyParams& params);

}  // namespace lipfast
