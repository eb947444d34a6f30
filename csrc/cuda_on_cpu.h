// Lets g++ compile a .cu file and run its kernels on the CPU, for tests: include it first, and
// write launches as LIPFAST_LAUNCH. Each CUDA thread is a fibre with its own stack; a barrier hands
// over to the next fibre. Threads of a block run one after another between barriers, so results are
// those of the kernel, races and speed are not. Shared memory is static to the kernel function, or,
// with LIPFAST_LAUNCH_SHARED and LIPFAST_DYNAMIC_SHARED, given at the launch and full of NaN at first.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#define LIPFAST_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define LIPFAST_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define LIPFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Lets a kernel take more dynamic shared memory than the 48 KB that need no leave.
template <typename Kernel>
cudaError_t lipfast_allow_shared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

#else

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

typedef struct CUstream_st* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_cpu {

struct Fibre {
  ucontext_t context;
  dim3 index;
  bool done = false;
  std::vector<char> stack = std::vector<char>(1 << 16);
};
inline ucontext_t scheduler;
inline Fibre* running;
inline const std::function<void()>* body;
inline std::vector<uint4> shared;  // dynamic, of the block that runs

inline void enter() {
  (*body)();
  running->done = true;
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  gridDim = grid, blockDim = block, body = &kernel;
  const unsigned threads = block.x * block.y * block.z;
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    std::fill(shared.begin(), shared.end(), uint4{~0u, ~0u, ~0u, ~0u});
    std::vector<Fibre> fibres(threads);
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& fibre = fibres[t];
      fibre.index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      fibre.context.uc_link = &scheduler;
      makecontext(&fibre.context, enter, 0);
    }
    for (bool active = true; active;) {  // one round from barrier to barrier
      active = false;
      for (Fibre& fibre : fibres) {
        if (fibre.done) continue;
        running = &fibre, threadIdx = fibre.index;
        swapcontext(&scheduler, &fibre.context);
        active = active || !fibre.done;
      }
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  swapcontext(&cuda_on_cpu::running->context, &cuda_on_cpu::scheduler);
}

#define LIPFAST_LAUNCH(kernel, grid, block, stream, ...) \
  LIPFAST_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define LIPFAST_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...)         \
  ((void)(stream), cuda_on_cpu::shared.resize((size_t(bytes) + 15) / 16),       \
   cuda_on_cpu::launch(grid, block, [&] { kernel(__VA_ARGS__); }))
#define LIPFAST_DYNAMIC_SHARED(name) \
  unsigned char* name = reinterpret_cast<unsigned char*>(cuda_on_cpu::shared.data())

template <typename Kernel>
cudaError_t lipfast_allow_shared(Kernel, int) {
  return cudaSuccess;
}

#endif
