// cayley on the CPU: one thread inverts or multiplies one matrix at a time in its caches.
#include "cayley.h"

#include <algorithm>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LIPFAST_CLONES_FMA \
  __attribute__((noinline, target_clones("avx512f", "fma", "default")))
#else
#define LIPFAST_CLONES_FMA
#endif

namespace lipfast {
namespace {

constexpr int64_t kLanes = 16;          // rows are padded to whole vectors of so many numbers
constexpr int64_t kPanel = 16;          // columns eliminated together
constexpr int64_t kParallel = 1 << 15;  // multiply-adds below which threads are not worth waking

// Memory of one thread: matrices of n rows, each a row of real parts and one of imaginary parts.
template <typename T, int kParts>
struct Scratch {
  explicit Scratch(int64_t n, int64_t matrices)
      : n(n),
        line((n + kLanes - 1) / kLanes * kLanes),
        size(n * kParts * line),
        memory(static_cast<size_t>(matrices * size + kPanel * kParts * (line + n))),
        pivots(static_cast<size_t>(n)),
        rows(memory.data() + matrices * size),
        factors(rows + kPanel * kParts * line) {}
  T* matrix(int64_t index) { return memory.data() + index * size; }
  T* row(int64_t index, int64_t i) { return matrix(index) + i * kParts * line; }

  int64_t n, line, size;
  std::vector<T> memory;
  std::vector<int64_t> pivots;
  T* rows;     // (kPanel, parts, line): pivot rows as they were
  T* factors;  // (n, parts, kPanel): what they are multiplied by
};

// to (kRows, parts, line) += factors times rows (kDepth, parts, line). The factors of a row are
// `stride` numbers from those of the next, imaginary parts `part` numbers from real parts.
template <typename T, int kParts, int kRows, int kDepth>
inline __attribute__((always_inline)) void add_rows(T* __restrict to, const T* __restrict factors,
                                                    int64_t stride, int64_t part,
                                                    const T* __restrict rows, int64_t line) {
  T real[kRows][kDepth], imaginary[kRows][kDepth];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kDepth; ++k) {
      real[r][k] = factors[r * stride + k];
      imaginary[r][k] = kParts == 2 ? factors[r * stride + part + k] : T(0);
    }
  }
  for (int64_t j = 0; j < line; ++j) {
    T sums[kRows][4] = {};  // short chains of additions
#pragma GCC unroll 16
    for (int k = 0; k < kDepth; ++k) {
      const T a = rows[kParts * k * line + j];
      const T b = kParts == 2 ? rows[(2 * k + 1) * line + j] : T(0);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] += real[r][k] * a;
        if (kParts == 2) {
          sums[r][1] += imaginary[r][k] * b;
          sums[r][2] += real[r][k] * b;
          sums[r][3] += imaginary[r][k] * a;
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      to[r * kParts * line + j] += sums[r][0] - sums[r][1];
      if (kParts == 2) to[(2 * r + 1) * line + j] += sums[r][2] + sums[r][3];
    }
  }
}

// to (count, parts, line) += factors (count, depth) times rows (depth, parts, line).
template <typename T, int kParts>
inline __attribute__((always_inline)) void add_product(T* to, const T* factors, int64_t stride,
                                                       int64_t part, const T* rows, int64_t count,
                                                       int64_t depth, int64_t line) {
  const int64_t size = kParts * line;
  int64_t k = 0;
  for (; k + kPanel <= depth; k += kPanel) {
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      add_rows<T, kParts, 2, kPanel>(to + i * size, factors + i * stride + k, stride, part,
                                     rows + k * size, line);
    }
    for (; i < count; ++i) {
      add_rows<T, kParts, 1, kPanel>(to + i * size, factors + i * stride + k, stride, part,
                                     rows + k * size, line);
    }
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < count; ++i) {
      add_rows<T, kParts, 1, 1>(to + i * size, factors + i * stride + k, stride, part,
                                rows + k * size, line);
    }
  }
}

template <typename T, int kParts>
T magnitude(const T* at, int64_t part) {
  return kParts == 1 ? at[0] * at[0] : at[0] * at[0] + at[part] * at[part];
}

// Gauss-Jordan elimination of the columns start to start + width - 1 alone, in place, with row
// pivots: leaves what the pivot rows, as they were, are multiplied by.
template <typename T, int kParts>
inline __attribute__((always_inline)) void eliminate_panel(Scratch<T, kParts>& s, int64_t start,
                                                           int64_t width) {
  const int64_t each = kParts * kPanel;
  for (int64_t i = 0; i < s.n; ++i) {
    for (int p = 0; p < kParts; ++p) {
      T* to = s.factors + i * each + p * kPanel;
      const T* from = s.row(0, i) + p * s.line + start;
      for (int64_t k = 0; k < kPanel; ++k) to[k] = k < width ? from[k] : T(0);
    }
  }
  for (int64_t k = 0; k < width; ++k) {
    int64_t pivot = start + k;
    T largest = magnitude<T, kParts>(s.factors + pivot * each + k, kPanel);
    for (int64_t i = pivot + 1; i < s.n; ++i) {
      const T size = magnitude<T, kParts>(s.factors + i * each + k, kPanel);
      if (size > largest) largest = size, pivot = i;
    }
    s.pivots[start + k] = pivot;
    T* row = s.factors + (start + k) * each;
    if (pivot != start + k) {
      std::swap_ranges(row, row + each, s.factors + pivot * each);
      std::swap_ranges(s.row(0, start + k), s.row(0, start + k) + kParts * s.line,
                       s.row(0, pivot));
    }
    T real = row[k], imaginary = kParts == 2 ? row[kPanel + k] : T(0);
    if (kParts == 1) {
      real = T(1) / real;
    } else {
      const T scale = T(1) / (real * real + imaginary * imaginary);
      real *= scale;
      imaginary *= -scale;
    }
    row[k] = T(1);
    if (kParts == 2) row[kPanel + k] = T(0);
    for (int64_t j = 0; j < kPanel; ++j) {
      const T a = row[j];
      if (kParts == 1) {
        row[j] = real * a;
      } else {
        const T b = row[kPanel + j];
        row[j] = real * a - imaginary * b;
        row[kPanel + j] = real * b + imaginary * a;
      }
    }
    for (int64_t i = 0; i < s.n; ++i) {
      if (i == start + k) continue;
      T* other = s.factors + i * each;
      const T a = other[k], b = kParts == 2 ? other[kPanel + k] : T(0);
      const T factors[2] = {-a, -b};
      add_rows<T, kParts, 1, 1>(other, factors, 0, 1, row, kPanel);
      // afterwards: a vector load must not wait for the store of one number in it
      other[k] = -a * row[k];
      if (kParts == 2) {
        other[k] += b * row[kPanel + k];
        other[kPanel + k] = -a * row[kPanel + k] - b * row[k];
      }
    }
  }
}

// Replaces matrix 0 by its inverse.
template <typename T, int kParts>
inline __attribute__((always_inline)) void invert(Scratch<T, kParts>& s) {
  const int64_t each = kParts * kPanel;
  for (int64_t start = 0; start < s.n; start += kPanel) {
    const int64_t width = std::min(kPanel, s.n - start);
    eliminate_panel(s, start, width);
    T* pivot_rows = s.row(0, start);
    std::copy(pivot_rows, pivot_rows + width * kParts * s.line, s.rows);
    std::fill(pivot_rows, pivot_rows + width * kParts * s.line, T(0));
    add_product<T, kParts>(s.matrix(0), s.factors, each, kPanel, s.rows, s.n, width, s.line);
    for (int64_t i = 0; i < s.n; ++i) {
      for (int p = 0; p < kParts; ++p) {
        const T* from = s.factors + i * each + p * kPanel;
        std::copy(from, from + width, s.row(0, i) + p * s.line + start);
      }
    }
  }
  for (int64_t k = s.n - 1; k >= 0; --k) {
    const int64_t pivot = s.pivots[k];
    if (pivot == k) continue;
    for (int64_t i = 0; i < s.n * kParts; ++i) {
      std::swap(s.matrix(0)[i * s.line + k], s.matrix(0)[i * s.line + pivot]);
    }
  }
}

template <typename T, int kParts>
LIPFAST_CLONES_FMA void forward_one(const CayleyParams& p, int64_t index, Scratch<T, kParts>& s) {
  const int64_t n = p.n, skip = p.rows * n;
  const T* u = static_cast<const T*>(p.matrix) + index * kParts * skip;
  const T* gram = static_cast<const T*>(p.other);
  for (int64_t i = 0; i < n; ++i) {
    for (int part = 0; part < kParts; ++part) {
      T* row = s.row(0, i) + part * s.line;
      const T* from = u + part * skip;
      const T sign = part == 0 ? T(-1) : T(1);
      for (int64_t j = 0; j < n; ++j) row[j] = from[i * n + j] + sign * from[j * n + i];
      if (gram) {
        const T* more = gram + ((index * kParts + part) * n + i) * n;
        for (int64_t j = 0; j < n; ++j) row[j] += more[j];
      }
      std::fill(row + n, row + s.line, T(0));
    }
    s.row(0, i)[i] += T(1);
  }
  invert(s);
  T* out = static_cast<T*>(p.out) + index * kParts * skip;
  for (int64_t i = 0; i < n; ++i) {
    for (int part = 0; part < kParts; ++part) {
      const T* row = s.row(0, i) + part * s.line;
      T* to = out + part * skip + i * n;
      for (int64_t j = 0; j < n; ++j) to[j] = T(2) * row[j];
    }
  }
}

template <typename T, int kParts>
LIPFAST_CLONES_FMA void backward_one(const CayleyParams& p, int64_t index, Scratch<T, kParts>& s) {
  const int64_t n = p.n, part_size = n * n, stride = kParts * s.line;
  const T* w = static_cast<const T*>(p.matrix) + index * kParts * part_size;
  const T* grad = static_cast<const T*>(p.other) + index * kParts * part_size;
  // 0: W^H, 1: dL/dW, 2: K = dL/dW + W^H dL/dW, 1 again: T = K + K W^H
  for (int64_t i = 0; i < n; ++i) {
    for (int part = 0; part < kParts; ++part) {
      T* row = s.row(0, i) + part * s.line;
      const T sign = part == 0 ? T(1) : T(-1);
      for (int64_t j = 0; j < n; ++j) row[j] = sign * w[part * part_size + j * n + i];
      std::fill(row + n, row + s.line, T(0));
      T* copy = s.row(1, i) + part * s.line;
      std::copy_n(grad + part * part_size + i * n, n, copy);
      std::fill(copy + n, copy + s.line, T(0));
    }
  }
  std::copy_n(s.matrix(1), s.size, s.matrix(2));
  add_product<T, kParts>(s.matrix(2), s.matrix(0), stride, s.line, s.matrix(1), n, n, s.line);
  std::copy_n(s.matrix(2), s.size, s.matrix(1));
  add_product<T, kParts>(s.matrix(1), s.matrix(2), stride, s.line, s.matrix(0), n, n, s.line);
  T* out = static_cast<T*>(p.out) + index * kParts * part_size;
  for (int64_t i = 0; i < n; ++i) {
    for (int part = 0; part < kParts; ++part) {
      const T* t = s.matrix(1) + part * s.line;
      T* to = out + part * part_size + i * n;
      const T sign = part == 0 ? T(0.5) : T(-0.5);
      for (int64_t j = 0; j < n; ++j) {
        to[j] = sign * t[j * stride + i] - T(0.5) * t[i * stride + j];
      }
    }
  }
}

template <typename T, int kParts>
void run(const CayleyParams& p, bool backward) {
#pragma omp parallel if (p.batch * p.n * p.n * p.n >= kParallel)
  {
    Scratch<T, kParts> scratch(p.n, backward ? 3 : 1);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.batch; ++index) {
      if (backward) {
        backward_one(p, index, scratch);
      } else {
        forward_one(p, index, scratch);
      }
    }
  }
}

void dispatch(const CayleyParams& p, bool backward) {
  if (p.is_double) {
    p.parts == 2 ? run<double, 2>(p, backward) : run<double, 1>(p, backward);
  } else {
    p.parts == 2 ? run<float, 2>(p, backward) : run<float, 1>(p, backward);
  }
}

}  // namespace

void cayley_forward_cpu(const CayleyParams& params) { dispatch(params, false); }
void cayley_backward_cpu(const CayleyParams& params) { dispatch(params, true); }

}  // namespace lipfast
