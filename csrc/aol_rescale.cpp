// aol_rescale on the CPU: a task handles a few rows of one kernel, one after another; what changes
// memory format passes through a buffer of one row that stays in the cache.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "aol_rescale.h"
#include "clones.h"

namespace lipfast {
namespace {

constexpr int64_t kParallelNumbers = 32768;  // below this, waking the threads costs more than it saves

// Short dtypes convert from and to float only.
template <typename S>
using Wide = std::conditional_t<(sizeof(S) < 4), float, S>;

// r^(-1/2) for each number of a row (channels, taps).
template <typename T>
std::vector<T> row_factors(const AolRescaleParams& p, int64_t n) {
  const T* r = static_cast<const T*>(p.r) + n * p.channels;
  std::vector<T> factors(static_cast<size_t>(p.channels * p.taps));
  for (int64_t c = 0; c < p.channels; ++c) {
    const T factor = r[c] > 0 ? 1 / std::sqrt(r[c]) : T(0);
    std::fill_n(factors.begin() + c * p.taps, p.taps, factor);
  }
  return factors;
}

template <typename T, typename S>
LIPFAST_CLONES void scale_rows(const AolRescaleParams& p, int64_t n, int64_t first, int64_t last) {
  const int64_t size = p.channels * p.taps;
  const std::vector<T> factors = row_factors<T>(p, n);
  std::vector<S> row(static_cast<size_t>(size));
  for (int64_t line = n * p.rows + first; line < n * p.rows + last; ++line) {
    const T* weight = static_cast<const T*>(p.weight) + line * size;
    S* out = static_cast<S*>(p.scaled) + line * size;
    S* to = p.channels_last ? row.data() : out;
    for (int64_t i = 0; i < size; ++i) to[i] = S(Wide<S>(weight[i] * factors[i]));
    if (!p.channels_last) continue;
    for (int64_t t = 0; t < p.taps; ++t) {
      for (int64_t c = 0; c < p.channels; ++c) *out++ = row[c * p.taps + t];
    }
  }
}

// Writes dL/dweight, and its sums over the rows and taps times weight.
template <typename T, typename S>
LIPFAST_CLONES void differentiate_rows(const AolRescaleParams& p, int64_t n, int64_t first,
                                       int64_t last, T* sums) {
  const int64_t size = p.channels * p.taps;
  const std::vector<T> factors = row_factors<T>(p, n);
  std::vector<T> products(static_cast<size_t>(size));
  std::vector<S> row(static_cast<size_t>(size));
  for (int64_t line = n * p.rows + first; line < n * p.rows + last; ++line) {
    const T* weight = static_cast<const T*>(p.weight) + line * size;
    const S* grad = static_cast<const S*>(p.scaled) + line * size;
    T* out = static_cast<T*>(p.grad_weight) + line * size;
    if (p.channels_last) {
      for (int64_t t = 0; t < p.taps; ++t) {
        for (int64_t c = 0; c < p.channels; ++c) row[c * p.taps + t] = *grad++;
      }
      grad = row.data();
    }
    for (int64_t i = 0; i < size; ++i) {
      out[i] = T(Wide<S>(grad[i])) * factors[i];
      products[i] += out[i] * weight[i];
    }
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    sums[c] = 0;
    for (int64_t t = 0; t < p.taps; ++t) sums[c] += products[c * p.taps + t];
  }
}

template <typename T, typename S>
void run(const AolRescaleParams& p, bool forward) {
  const int64_t parts = (p.rows + kAolRescaleRows - 1) / kAolRescaleRows;
  std::vector<T> partial(static_cast<size_t>(forward ? 0 : p.n * parts * p.channels));
#pragma omp parallel for schedule(static) \
    if (p.n * p.rows * p.channels * p.taps >= kParallelNumbers)
  for (int64_t task = 0; task < p.n * parts; ++task) {
    const int64_t n = task / parts, first = task % parts * kAolRescaleRows;
    const int64_t last = std::min<int64_t>(p.rows, first + kAolRescaleRows);
    if (forward) {
      scale_rows<T, S>(p, n, first, last);
    } else {
      differentiate_rows<T, S>(p, n, first, last, partial.data() + task * p.channels);
    }
  }
  if (forward) return;
  T* grad_r = static_cast<T*>(p.partial);
  std::fill_n(grad_r, p.n * p.channels, T(0));
  for (int64_t task = 0; task < p.n * parts; ++task) {
    T* sums = grad_r + task / parts * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) sums[c] += partial[task * p.channels + c];
  }
  const T* r = static_cast<const T*>(p.r);
  for (int64_t i = 0; i < p.n * p.channels; ++i) {
    grad_r[i] = r[i] > 0 ? grad_r[i] / (-2 * r[i]) : T(0);
  }
}

template <typename T>
void run(const AolRescaleParams& p, bool forward) {
  switch (p.dtype) {
    case DType::kFloat64: return run<T, double>(p, forward);
    case DType::kFloat32: return run<T, float>(p, forward);
    case DType::kBFloat16: return run<T, RoundedBFloat16>(p, forward);
    case DType::kFloat16: break;
  }
  throw std::invalid_argument("aol_rescale: there is no float16 on a CPU");
}

}  // namespace

void aol_rescale_forward_cpu(const AolRescaleParams& p) {
  p.is_double ? run<double>(p, true) : run<float>(p, true);
}

void aol_rescale_backward_cpu(const AolRescaleParams& p) {
  p.is_double ? run<double>(p, false) : run<float>(p, false);
}

}  // namespace lipfast
