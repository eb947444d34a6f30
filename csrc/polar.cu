// polar on CUDA: one block of 16 x 16 threads per matrix keeps it in shared memory through the
// whole schedule, or through all conjugate gradients. Every sum has a fixed order.
#include "cuda_on_cpu.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "polar_block.cuh"
#include "polar_solve.cuh"

namespace lipfast {
namespace {

#if defined(__CUDACC__)
extern __shared__ float shared_memory[];
#else
float shared_memory[200 * 1024 / sizeof(float)];
#endif

// X, S, S^2 stay in shared memory; a step ends with X <- a X + M X, M = b S + c S^2 in place of S.
template <int kPlanes, int kEach>
__global__ void __launch_bounds__(kPolarThreads, 2) polar_forward_kernel(PolarParams p) {
  using Sums = Tile<kPlanes, kEach>;
  const int m = p.rows, n = p.columns;
  const Matrix x{shared_memory, m, n, polar_stride(n)};
  const Matrix s{x.end(kPlanes), m, m, polar_stride(m)};
  const Matrix s2{s.end(kPlanes), m, m, polar_stride(m)};
  float* scratch = s2.end(kPlanes);
  const int thread = threadIdx.y * kSide + threadIdx.x;
  const int64_t count = int64_t(kPlanes) * m * n;
  const float* from = p.x + blockIdx.x * count;

  const float largest = largest_entry(from, count, scratch);
  const float size = largest == 0 ? 1.f : largest;
  load_columns<kPlanes>(from, n, 0, x);
  __syncthreads();
  for (int line = threadIdx.y; line < kPlanes * m; line += kSide) {
    for (int j = threadIdx.x; j < n; j += kSide) x.at[line * x.stride + j] /= size;
  }
  __syncthreads();

  for (int step = 0; step < p.steps; ++step) {
    float a = float(p.schedule[step][0]), b = float(p.schedule[step][1]);
    const float c = float(p.schedule[step][2]);
    float root = 1, scale = 1;  // of X and S, so that they are normalised
    {
      Sums sums;
      multiply<true, true>(x, x, sums);
      store_mirrored(sums, s);
    }
    __syncthreads();
    if (step == 0 || c != 0) {
      Sums sums;
      multiply<true, true>(s, s, sums);
      store_mirrored(sums, s2);
      __syncthreads();
    }
    if (step == 0) {
      float line = 0, squares = 0;
      if (thread < m) {
        for (int j = 0; j < m; ++j) {
          float power = s2(0, thread, j) * s2(0, thread, j);
          if constexpr (kPlanes == 2) power += s2(1, thread, j) * s2(1, thread, j);
          line += std::sqrt(power);
          squares += power;
        }
      }
      const float frobenius = std::sqrt(sum_all(squares, scratch));
      const float infinity = largest_all(line, scratch);
      const float bound = infinity < frobenius ? infinity : frobenius;
      const float nu = std::sqrt(bound) * (1 + 1e-5f);
      scale = nu == 0 ? 0.f : 1 / nu;
      root = std::sqrt(scale);
    }
    if (step == p.steps - 1) {
      // a X + b S X as (a + b) X + b (S - I) X, where the second term is small
      float defect = 0;
      Sums::each([&](int, int, int i, int j) {
        if (i >= m || j >= m) return;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          float& entry = s(plane, i, j);
          entry = scale * entry - float(plane == 0 && i == j);
          defect += entry * entry;
        }
      });
      defect = sum_all(defect, scratch);
      if (thread == 0) p.out[blockIdx.x] = std::sqrt(defect);
      a += b;
    } else {
      b *= scale;
    }
    const float of_x = a * root, of_s = b * root, of_s2 = c * scale * scale * root;
    for (int line = threadIdx.y; line < kPlanes * m; line += kSide) {
      for (int j = threadIdx.x; j < m; j += kSide) {
        float& entry = s.at[line * s.stride + j];
        entry = of_s * entry + (c != 0 ? of_s2 * s2.at[line * s2.stride + j] : 0.f);
      }
    }
    __syncthreads();
    for (int first = 0; first < n; first += kSide * kEach) {
      Sums sums;
      multiply<false, false>(s, x, sums, first);
      __syncthreads();  // these columns of X have been read
      sums.store(m, n - first, [&](int plane, int i, int j, float value) {
        float& entry = x(plane, i, first + j);
        entry = of_x * entry + value;
      });
    }
    __syncthreads();
  }
  float* to = p.w + blockIdx.x * count;
  for (int line = threadIdx.y; line < kPlanes * m; line += kSide) {
    for (int j = threadIdx.x; j < n; j += kSide) to[line * n + j] = x.at[line * x.stride + j];
  }
}

// dL/dx = L W + H^-1 (G - G W^H W): H L + L H = G W^H - W G^H first, then H Y + Y H = 2 I for H^-1.
template <int kPlanes, int kEach>
__global__ void __launch_bounds__(kPolarThreads, kEach == 4 ? 1 : 2)
    polar_backward_kernel(PolarParams p) {
  using Sums = Tile<kPlanes, kEach>;
  const int m = p.rows, n = p.columns;
  const Matrix h{shared_memory, m, m, polar_stride(m)};
  const Matrix solution{h.end(kPlanes), m, m, polar_stride(m)};
  float* free = solution.end(kPlanes);
  const Matrix buffer{free, m, m, polar_stride(m)};
  const Matrix part{free, m, kSide * kEach, polar_stride(kSide * kEach)};
  float* scratch = free + kPlanes * m * (kSide * kEach + 2);
  const int64_t count = int64_t(kPlanes) * m * n;
  const float* x = p.x + blockIdx.x * count;
  const float* w = p.w + blockIdx.x * count;
  const float* grad = p.grad + blockIdx.x * count;
  float* out = p.out + blockIdx.x * count;

  const float x_factor = 1 / divisor(largest_entry(x, count, scratch));
  const float grad_size = divisor(largest_entry(grad, count, scratch));
  const float grad_factor = 1 / grad_size;
  const float unbounded = grad_size * x_factor;
  const float back = unbounded > FLT_MAX ? FLT_MAX : unbounded;  // 0 stays 0
  {  // H = x W^H, kept positive definite where W has not converged
    float squares = 0;
    for (int64_t i = threadIdx.y * kSide + threadIdx.x; i < count; i += kPolarThreads) {
      squares += x_factor * x[i] * x_factor * x[i];
    }
    const float norm = std::sqrt(sum_all(squares, scratch));
    const float shift = (norm < 1 ? 1 : norm) * kPolarShift / std::sqrt(float(m));
    Sums sums;
    multiply_global(x, w, x_factor, shift, m, n, free, sums);
    add_adjoint(sums, buffer, 1.f);
    sums.store(m, m, [&](int q, int i, int j, float value) {
      h(q, i, j) = 0.5f * value + (q == 0 && i == j ? shift : 0.f);
    });
  }
  for (int pass = 0; pass < (m < n ? 2 : 1); ++pass) {
    {
      Sums r;
      if (pass == 0) {
        multiply_global(grad, w, grad_factor, 0.f, m, n, free, r);
        add_adjoint(r, buffer, -1.f);
      } else {
        r.load(m, m, [&](int q, int i, int j) { return q == 0 && i == j ? 2.f : 0.f; });
      }
      __syncthreads();
      solve(h, r, pass == 0 ? -1.f : 1.f, p.steps, solution, buffer, scratch);
    }
    if (pass == 1) {  // H has served: its place takes G W^H
      Sums sums;
      multiply_global(grad, w, grad_factor, 0.f, m, n, free, sums);
      sums.store(m, m, [&](int q, int i, int j, float value) { h(q, i, j) = value; });
    }
    for (int first = 0; first < n; first += kSide * kEach) {
      __syncthreads();  // the last part has been read
      load_columns<kPlanes>(w, n, first, part);
      __syncthreads();
      if (pass == 1) {
        Sums inside;
        multiply<false, false>(h, part, inside);
        __syncthreads();
        inside.store(m, n - first, [&](int q, int i, int j, float value) {
          const float entry = grad[(q * m + i) * int64_t(n) + first + j];
          part(q, i, j) = grad_factor * entry - value;
        });
        __syncthreads();
      }
      Sums sums;
      multiply<false, false>(solution, part, sums);
      sums.store(m, n - first, [&](int q, int i, int j, float value) {
        float& entry = out[(q * m + i) * int64_t(n) + first + j];
        entry = (pass == 0 ? 0.f : entry) + back * value;
      });
    }
    __syncthreads();
  }
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this error again
  throw std::runtime_error("polar: CUDA error " + std::to_string(int(error)) + ": " +
                           cudaGetErrorString(error));
}

using Kernel = void (*)(PolarParams);

template <int kPlanes>
Kernel kernel_for(bool forward, int rows) {
  switch (polar_each(rows)) {
    case 1:
      return forward ? polar_forward_kernel<kPlanes, 1> : polar_backward_kernel<kPlanes, 1>;
    case 2:
      return forward ? polar_forward_kernel<kPlanes, 2> : polar_backward_kernel<kPlanes, 2>;
    default:
      return forward ? polar_forward_kernel<kPlanes, 4> : polar_backward_kernel<kPlanes, 4>;
  }
}

void launch(bool forward, const PolarParams& p, cudaStream_t stream) {
  if (p.planes < 1 || p.planes > 2 || p.rows > p.columns || p.rows > kPolarMaxRows ||
      p.batch > INT32_MAX || p.steps < 1 || (forward && p.steps > kPolarMaxSteps)) {
    throw std::invalid_argument("polar: sizes beyond those of the kernels");
  }
  if (p.batch == 0 || p.rows == 0) return;
  const Kernel kernel = p.planes == 1 ? kernel_for<1>(forward, p.rows) : kernel_for<2>(forward, p.rows);
  const int64_t numbers = forward ? polar_forward_numbers(p.planes, p.rows, p.columns)
                                  : polar_backward_numbers(p.planes, p.rows);
  const int bytes = int(numbers * int64_t(sizeof(float)));
#if defined(__CUDACC__)
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<unsigned(p.batch), dim3(kSide, kSide), bytes, stream>>>(p);
#else
  if (bytes > int(sizeof(shared_memory))) throw std::invalid_argument("polar: shared memory");
  std::memset(shared_memory, 0xff, sizeof(shared_memory));  // what is not written shows as NaN
  LIPFAST_LAUNCH(kernel, dim3(unsigned(p.batch)), dim3(kSide, kSide), stream, p);
#endif
  check(cudaGetLastError());
}

}  // namespace

void polar_forward_cuda(const PolarParams& params, cudaStream_t stream) {
  launch(true, params, stream);
}

void polar_backward_cuda(const PolarParams& params, cudaStream_t stream) {
  launch(false, params, stream);
}

#if defined(__CUDACC__)
int64_t polar_shared_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}
#endif

}  // namespace lipfast
