// Functions of the CPU kernels that are compiled twice.
#pragma once

// Code for AVX2 beside the portable one, chosen when the library is loaded. What such a function
// calls must be inlined, LIPFAST_INLINE, to be compiled for AVX2 too.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LIPFAST_CLONES __attribute__((noinline, target_clones("avx2", "default")))
#else
#define LIPFAST_CLONES
#endif

#if defined(__GNUC__)
#define LIPFAST_INLINE inline __attribute__((always_inline))
#else
#define LIPFAST_INLINE inline
#endif
