// gram_bound on the CPU: everything but the matrix products, which the caller leaves to a GEMM.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "clones.h"
#include "gram_bound.h"

namespace lipfast {
namespace {

constexpr int64_t kRows = 16;     // channels of one task; the sums of tasks are added up in order
constexpr int64_t kColumns = 64;  // numbers that stay in the first-level cache, whole vectors
constexpr int64_t kLanes = 16;    // sums of one row that advance together
constexpr int64_t kParallelPairs = 2048;  // below this, waking the threads costs more than it saves

int64_t tasks(const GramBoundParams& p) { return (p.channels + kRows - 1) / kRows; }

// Products of the taps in one row of the kernel with those in it and in all later rows.
template <typename T>
struct Products {
  Products(const GramBoundParams& p, GramBoundProducts kind, int64_t batch, int row) {
    const bool all = kind == GramBoundProducts::kAllTaps;
    const int64_t side = p.kw * p.channels, later = p.kh - row;
    line = (all ? p.kh : later) * side;
    const int64_t before = all ? (batch * p.kh + row) * p.kh
                               : p.batch * (row * p.kh - row * (row - 1) / 2) + batch * later;
    at = static_cast<const T*>(p.taps) + before * side * side + (all ? row * side : 0);
  }
  const T* at;
  int64_t line;
};

// Adds up count products of G(offset)_ij from j = start on.
template <typename T>
LIPFAST_INLINE void correlate(const GramBoundParams& p, GramBoundProducts kind, int64_t batch,
                              int64_t i, int64_t offset, int64_t start, int64_t count, T* gram) {
  const int64_t c = p.channels;
  if (kind == GramBoundProducts::kSummed) {
    const int64_t place = ((batch * c + i) * p.offsets() + offset) * c + start;
    std::copy_n(static_cast<const T*>(p.taps) + place, count, gram);
    return;
  }
  const int dy = int((offset + p.kw - 1) / (2 * p.kw - 1));
  const int dx = int(offset - int64_t(dy) * (2 * p.kw - 1));
  for (int row = 0; row < p.kh - dy; ++row) {
    const Products<T> products(p, kind, batch, row);
    for (int x = std::max(0, -dx); x < p.kw - std::max(0, dx); ++x) {
      const int64_t column = (dy * p.kw + x + dx) * c + start;
      const T* from = products.at + (x * c + i) * products.line + column;
      for (int64_t j = 0; j < count; ++j) gram[j] += from[j];
    }
  }
}

// Writes the signs of G(d)_ij for i from first to last - 1; sums[i] is what row i gives to q_i r_i,
// columns[j] what these rows give to q_j r_j.
template <typename T>
LIPFAST_CLONES void sum_rows(const GramBoundParams& p, GramBoundProducts kind, int64_t batch,
                             int64_t first, int64_t last, T* sums, T* columns) {
  const int64_t c = p.channels, offsets = p.offsets();
  const T* q = static_cast<const T*>(p.q) + batch * c;
  for (int64_t i = first; i < last; ++i) {
    T lanes[kLanes] = {};
    for (int64_t start = 0; start < c; start += kColumns) {
      const int64_t count = std::min(kColumns, c - start);
      T line[kColumns] = {}, others[kColumns] = {};
      for (int64_t offset = 0; offset < offsets; ++offset) {
        T gram[kColumns] = {};
        correlate(p, kind, batch, i, offset, start, count, gram);
        int8_t* signs = p.signs + ((batch * c + i) * offsets + offset) * c + start;
        for (int64_t j = 0; j < count; ++j) signs[j] = int8_t((gram[j] > 0) - (gram[j] < 0));
        T* to = offset == 0 ? line : others;  // offset 0 is symmetric and complete
        for (int64_t j = 0; j < kColumns; ++j) to[j] += std::fabs(gram[j]);
      }
      for (int64_t j = 0; j < count; ++j) {
        columns[start + j] += others[j] * q[i];
        line[j] = (line[j] + others[j]) * q[start + j];
      }
      for (int64_t j = 0; j < kColumns; ++j) lanes[j % kLanes] += line[j];
    }
    sums[i] = std::accumulate(lanes, lanes + kLanes, T(0));
  }
}

template <typename T>
void forward(const GramBoundParams& p, GramBoundProducts kind) {
  const int64_t c = p.channels, each = tasks(p), all = p.batch * each;
  std::vector<T> columns(static_cast<size_t>(all * c));
#pragma omp parallel for schedule(static) if (p.batch * c * c >= kParallelPairs)
  for (int64_t task = 0; task < all; ++task) {
    const int64_t batch = task / each, first = task % each * kRows;
    sum_rows(p, kind, batch, first, std::min(c, first + kRows),
             static_cast<T*>(p.out) + batch * c, columns.data() + task * c);
  }
  for (int64_t task = 0; task < all; ++task) {
    T* sums = static_cast<T*>(p.out) + task / each * c;
    for (int64_t j = 0; j < c; ++j) sums[j] += columns[task * c + j];
  }
}

// Signs of the rows from first on at the opposite offsets: (offsets, kRows, channels).
std::vector<int8_t> opposite_signs(const GramBoundParams& p, int64_t batch, int64_t first,
                                   int64_t rows) {
  const int64_t c = p.channels, offsets = p.offsets();
  std::vector<int8_t> opposite(static_cast<size_t>(offsets * kRows * c));
  for (int64_t offset = 1; offset < offsets; ++offset) {
    for (int64_t i = 0; i < c; ++i) {
      const int8_t* from = p.signs + ((batch * c + i) * offsets + offset) * c + first;
      for (int64_t j = 0; j < rows; ++j) opposite[(offset * kRows + j) * c + i] = from[j];
    }
  }
  return opposite;
}

// Writes factors[i] = sign_i (a_i q_j + a_j q_i).
template <typename T>
LIPFAST_INLINE void multiply(const GramBoundParams& p, int64_t batch, int64_t j, const int8_t* sign,
                             T* factors) {
  const T* a = static_cast<const T*>(p.a) + batch * p.channels;
  const T* q = static_cast<const T*>(p.q) + batch * p.channels;
  for (int64_t i = 0; i < p.channels; ++i) factors[i] = T(sign[i]) * (a[i] * q[j] + a[j] * q[i]);
}

// Writes the rows (y, j) of the matrix S(x - y)_ji, j from first to last - 1.
template <typename T>
LIPFAST_CLONES void fill_matrix(const GramBoundParams& p, int64_t batch, int64_t first,
                                int64_t last) {
  const int64_t c = p.channels, offsets = p.offsets();
  const int taps = p.kh * p.kw;
  T* out = static_cast<T*>(p.out) + batch * taps * c * taps * c;
  const std::vector<int8_t> opposite = opposite_signs(p, batch, first, last - first);
  std::vector<T> factors((2 * offsets - 1) * c);
  T* zero = factors.data() + (offsets - 1) * c;
  for (int64_t j = first; j < last; ++j) {
    for (int64_t offset = 0; offset < offsets; ++offset) {
      const int8_t* sign = p.signs + ((batch * c + j) * offsets + offset) * c;
      multiply(p, batch, j, sign, zero + offset * c);
      if (offset == 0) continue;
      multiply(p, batch, j, &opposite[(offset * kRows + j - first) * c], zero - offset * c);
    }
    for (int y = 0; y < taps; ++y) {
      T* to = out + (y * c + j) * taps * c;
      for (int x = 0; x < taps; ++x, to += c) {
        const int64_t offset = (x / p.kw - y / p.kw) * (2 * p.kw - 1) + x % p.kw - y % p.kw;
        std::memcpy(to, zero + offset * c, size_t(c) * sizeof(T));
      }
    }
  }
}

// Writes the rows j of S(d)_ji at the offsets d of the half plane.
template <typename T>
LIPFAST_CLONES void fill_factors(const GramBoundParams& p, int64_t batch, int64_t first,
                                 int64_t last) {
  const int64_t c = p.channels, offsets = p.offsets();
  for (int64_t j = first; j < last; ++j) {
    for (int64_t offset = 0; offset < offsets; ++offset) {
      const int64_t place = ((batch * c + j) * offsets + offset) * c;
      multiply(p, batch, j, p.signs + place, static_cast<T*>(p.out) + place);
    }
  }
}

template <typename T>
void backward(const GramBoundParams& p, bool matrix) {
  const int64_t c = p.channels, each = tasks(p);
#pragma omp parallel for schedule(static) if (p.batch * c * c >= kParallelPairs)
  for (int64_t task = 0; task < p.batch * each; ++task) {
    const int64_t batch = task / each, first = task % each * kRows;
    const int64_t last = std::min(c, first + kRows);
    matrix ? fill_matrix<T>(p, batch, first, last) : fill_factors<T>(p, batch, first, last);
  }
}

}  // namespace

void gram_bound_forward_cpu(const GramBoundParams& p, GramBoundProducts kind) {
  p.is_double ? forward<double>(p, kind) : forward<float>(p, kind);
}

void gram_bound_backward_cpu(const GramBoundParams& p, bool matrix) {
  p.is_double ? backward<double>(p, matrix) : backward<float>(p, matrix);
}

}  // namespace lipfast
