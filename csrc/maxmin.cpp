// maxmin on the CPU. A chunk of pairs is compared row by row into one byte per pair, which stays in
// the first-level cache, and the bytes are then packed into bits: rows need not end at a byte.
#include "maxmin.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "clones.h"

namespace lipfast {
namespace {

constexpr int64_t kChunk = 2048;          // a multiple of 16: whole mask bytes, whole short rows
constexpr int64_t kParallelPairs = 8192;  // below this, waking the threads costs more than it saves

// Rows of pairs whose elements lie in two runs (a, b), as in NCHW.
template <typename Type, typename T = typename Type::Element>
LIPFAST_CLONES void order_runs(const T* __restrict a, const T* __restrict b, T* __restrict larger,
                               T* __restrict smaller, uint8_t* __restrict swap, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    swap[i] = order_pair(Type(), a[i], b[i], larger[i], smaller[i]);
  }
}
template <typename T>
LIPFAST_CLONES void swap_runs(const T* __restrict a, const T* __restrict b, T* __restrict first,
                              T* __restrict second, const uint8_t* __restrict swap, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T change = (a[i] ^ b[i]) & (T(0) - T(swap[i]));
    first[i] = a[i] ^ change;
    second[i] = b[i] ^ change;
  }
}

// Rows of pairs whose elements are neighbours, as in NHWC.
template <typename Type, typename T = typename Type::Element>
LIPFAST_CLONES void order_neighbours(const T* __restrict x, T* __restrict y,
                                     uint8_t* __restrict swap, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    T larger, smaller;
    swap[i] = order_pair(Type(), x[2 * i], x[2 * i + 1], larger, smaller);
    y[2 * i] = larger;
    y[2 * i + 1] = smaller;
  }
}
template <typename T>
LIPFAST_CLONES void swap_neighbours(const T* __restrict x, T* __restrict y,
                                    const uint8_t* __restrict swap, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T change = (x[2 * i] ^ x[2 * i + 1]) & (T(0) - T(swap[i]));
    y[2 * i] = x[2 * i] ^ change;
    y[2 * i + 1] = x[2 * i + 1] ^ change;
  }
}

// Whole NCHW rows of a small map, one after another: a call per row would cost more than its work.
template <typename Type, int kRow, typename T = typename Type::Element>
LIPFAST_CLONES void order_short_rows(const T* __restrict x, T* __restrict y,
                                     uint8_t* __restrict swap, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row, x += 2 * kRow, y += 2 * kRow, swap += kRow) {
    for (int i = 0; i < kRow; ++i) {
      swap[i] = order_pair(Type(), x[i], x[kRow + i], y[i], y[kRow + i]);
    }
  }
}
template <typename T, int kRow>
LIPFAST_CLONES void swap_short_rows(const T* __restrict x, T* __restrict y,
                                    const uint8_t* __restrict swap, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row, x += 2 * kRow, y += 2 * kRow, swap += kRow) {
    for (int i = 0; i < kRow; ++i) {
      const T change = (x[i] ^ x[kRow + i]) & (T(0) - T(swap[i]));
      y[i] = x[i] ^ change;
      y[kRow + i] = x[kRow + i] ^ change;
    }
  }
}

LIPFAST_CLONES void pack_bits(const uint8_t* swap, uint8_t* mask, int64_t count) {
  for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) {
    uint64_t eight = 0;
    std::memcpy(&eight, swap + byte * 8, static_cast<size_t>(std::min<int64_t>(8, count - byte * 8)));
    // Eight bytes of 0 or 1, the first in the lowest: their bits meet in the highest byte.
    mask[byte] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}
LIPFAST_CLONES void unpack_bits(const uint8_t* mask, uint8_t* swap, int64_t count) {
  for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) {
    const uint64_t bit_each = mask[byte] * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t eight = (bit_each + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    std::memcpy(swap + byte * 8, &eight, 8);
  }
}

template <int kRow, typename Type, typename T>
void transform_short_rows(Type, const T* x, T* y, uint8_t* swap, int64_t rows) {
  order_short_rows<Type, kRow>(x, y, swap, rows);
}
template <int kRow, typename T>
void transform_short_rows(Raw<T>, const T* x, T* y, uint8_t* swap, int64_t rows) {
  swap_short_rows<T, kRow>(x, y, swap, rows);
}

template <typename Type, typename T>
void transform_row(Type, const T* x, T* y, const MaxMinParams& p, uint8_t* swap, int64_t count) {
  if (p.channels_last) return order_neighbours<Type>(x, y, swap, count);
  order_runs<Type>(x, x + p.partner(), y, y + p.partner(), swap, count);
}
template <typename T>
void transform_row(Raw<T>, const T* x, T* y, const MaxMinParams& p, uint8_t* swap, int64_t count) {
  if (p.channels_last) return swap_neighbours(x, y, swap, count);
  swap_runs(x, x + p.partner(), y, y + p.partner(), swap, count);
}

template <typename Type, typename T>
void transform_rows(Type type, const T* x, T* y, const MaxMinParams& p, uint8_t* swap,
                    int64_t begin, int64_t end) {
  const bool even = p.channels % 2 == 0;
  if (even && !p.channels_last && (p.spatial == 4 || p.spatial == 16)) {
    // Chunks hold whole rows, and rows follow each other.
    x += 2 * begin, y += 2 * begin;
    if (p.spatial == 4) return transform_short_rows<4>(type, x, y, swap, (end - begin) / 4);
    return transform_short_rows<16>(type, x, y, swap, (end - begin) / 16);
  }
  // An even number of channels, last in memory: all rows are one.
  const int64_t row_pairs = even && p.channels_last ? p.pairs() : p.row_pairs();
  for (int64_t pair = begin; pair < end;) {
    const int64_t row = pair / row_pairs, position = pair % row_pairs;
    const int64_t count = std::min(row_pairs - position, end - pair);
    const int64_t offset = p.row_offset(row) + position * p.step();
    transform_row(type, x + offset, y + offset, p, swap + (pair - begin), count);
    pair += count;
  }
}

template <bool kForward, typename Type>
void transform_chunk(const MaxMinParams& p, int64_t begin, int64_t end) {
  using T = typename Type::Element;
  uint8_t swap[kChunk];
  if (!kForward) unpack_bits(p.mask + begin / 8, swap, end - begin);
  transform_rows(Type(), static_cast<const T*>(p.x), static_cast<T*>(p.y), p, swap, begin, end);
  if (kForward) pack_bits(swap, p.mask + begin / 8, end - begin);
}

template <bool kForward, typename Type>
void transform(const MaxMinParams& p) {
  using T = typename Type::Element;
  const int64_t pairs = p.pairs(), chunks = (pairs + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) if (pairs >= kParallelPairs)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    transform_chunk<kForward, Type>(p, chunk * kChunk, std::min(pairs, (chunk + 1) * kChunk));
  }
  if (p.channels % 2 == 0) return;
  const int64_t singles = p.batch * p.spatial;
#pragma omp parallel for schedule(static) if (singles >= kParallelPairs)
  for (int64_t i = 0; i < singles; ++i) {
    const int64_t offset = p.last_channel_offset(i);
    static_cast<T*>(p.y)[offset] = static_cast<const T*>(p.x)[offset];
  }
}

}  // namespace

void maxmin_forward_cpu(const MaxMinParams& p) {
  switch (p.dtype) {
    case DType::kFloat64: return transform<true, Float<double>>(p);
    case DType::kFloat32: return transform<true, Float<float>>(p);
    case DType::kBFloat16: return transform<true, BFloat16>(p);
    case DType::kFloat16: return transform<true, Float16>(p);
  }
  throw std::invalid_argument("maxmin: unknown dtype");
}

void maxmin_backward_cpu(const MaxMinParams& p) {
  switch (p.dtype) {
    case DType::kFloat64: return transform<false, Raw<uint64_t>>(p);
    case DType::kFloat32: return transform<false, Raw<uint32_t>>(p);
    case DType::kBFloat16:
    case DType::kFloat16: return transform<false, Raw<uint16_t>>(p);
  }
  throw std::invalid_argument("maxmin: unknown dtype");
}

}  // namespace lipfast
