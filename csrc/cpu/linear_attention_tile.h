// Products in a block of tokens: triangular tiles, states, and transposed operands in panels.
#pragma once
#include "linear_attention.h"
#include "operands.h"

namespace fastnlp {
namespace {

// Rows of n numbers, apart by an odd number of cache lines: columns would share a set of the cache otherwise.
template <class C>
constexpr int64_t row_stride(int64_t n) {
  return (padded_to_panel<C>(n) / kPanel<C> | 1) * kPanel<C>;
}

template <class C>
FASTNLP_INLINE C dot(const C* a, const C* b, int64_t n) {
  constexpr int lanes = Simd<C>::lanes;
  Vec<C> sum = {}, more = {};
  int64_t x = 0;
  for (; x + 2 * lanes <= n; x += 2 * lanes) {
    sum += load(a + x) * load(b + x);
    more += load(a + x + lanes) * load(b + x + lanes);
  }
  C rest = 0;
  for (; x < n; ++x) rest += a[x] * b[x];
  return sum_of(sum + more) + rest;
}

// panels [n / panel, depth, panel] <- rows [n, depth]; columns at and behind n are anything.
template <class C>
void to_panels(int64_t n, int64_t depth, const C* rows, int64_t stride, C* panels) {
  constexpr int lanes = Simd<C>::lanes;
  for (int64_t t = 0; t < n; t += kPanel<C>)
    for (int64_t x = 0; x < depth; x += lanes)
      for (int64_t half = 0; half < kPanel<C>; half += lanes) {
        Vec<C> v[lanes];
        for (int l = 0; l < lanes; ++l) v[l] = load(rows + (t + half + l) * stride + x);
        transpose<lanes / 2, C>(v);
        for (int l = 0; l < lanes && x + l < depth; ++l) store(panels + t * depth + (x + l) * kPanel<C> + half, v[l]);
      }
}

// rows [n, depth] <- columns [depth, kBlock]
template <class C>
void to_rows(int64_t n, int64_t depth, const C* columns, C* rows, int64_t stride) {
  constexpr int lanes = Simd<C>::lanes;
  for (int64_t t = 0; t < n; t += lanes)
    for (int64_t x = 0; x < depth; x += lanes) {
      Vec<C> v[lanes];
      for (int l = 0; l < lanes; ++l) v[l] = load(columns + (x + l) * kBlock + t);
      transpose<lanes / 2, C>(v);
      for (int l = 0; l < lanes; ++l) store(rows + (t + l) * stride + x, v[l]);
    }
}

// Rows of the next block, asked for a few cache lines at a time between products: those of a head lie too far apart for
// the hardware to guess them, and all at once they would wait for each other.
class Ahead {
 public:
  // `first` may lie outside of the tensor: it is never read.
  void expect(uintptr_t first, int64_t step, int64_t rows, int64_t bytes) {
    if (count_ == kMost || rows <= 0) return;
    wanted_[(first_ + count_++) % kMost] = {first, step, rows, bytes};
  }
  void ask() {
    for (int i = 0; i < kLines && count_ > 0; ++i) {
      Rows& rows = wanted_[first_];
      __builtin_prefetch(reinterpret_cast<const void*>(rows.at + at_), 0, 2);
      at_ += 64;
      if (at_ < rows.bytes) continue;
      at_ = 0;
      rows.at += rows.step;
      if (--rows.rows > 0) continue;
      first_ = (first_ + 1) % kMost;
      --count_;
    }
  }

 private:
  struct Rows {
    uintptr_t at;
    int64_t step;
    int64_t rows;
    int64_t bytes;
  };
  static constexpr int kMost = 8;
  static constexpr int kLines = 16;
  Rows wanted_[kMost];
  int first_ = 0;
  int count_ = 0;
  int64_t at_ = 0;
};

// to [rows, width] = or += a [rows, depth] b [depth, width], all of whose rows are whole panels.
template <class C, bool ADD>
void multiply(int64_t rows, int64_t depth, int64_t width, const C* a, int64_t a_row, int64_t a_step, const C* b,
              int64_t b_step, C* to, int64_t to_row, Ahead& ahead) {
  for (int64_t y = 0; y < width; y += kPanel<C>)
    for (int64_t r = 0; r < rows; r += kGroup) {
      ahead.ask();
      product<C, ADD>(std::min(kGroup, rows - r), depth, a + r * a_row, a_row, a_step, b + y, b_step,
                      to + r * to_row + y, to_row);
    }
}

// The cells of a tile [n, n] with column <= row, or with column >= row. Whole groups and panels are computed.
template <class C>
struct Triangle {
  static constexpr int64_t stride = kBlock;
  static constexpr int64_t elements = kBlock * kBlock;

  const int64_t n;
  const bool upper;

  int64_t first_panel(int64_t row) const { return upper ? row / kGroup * kGroup / kPanel<C> * kPanel<C> : 0; }
  int64_t last_panel(int64_t row) const {
    return padded_to_panel<C>(upper ? n : std::min(row / kGroup * kGroup + kGroup, n));
  }

  // cells <- a [n, depth] panels
  void score(int64_t depth, const C* a, int64_t a_row, const C* panels, C* cells) const {
    for (int64_t x = 0; x < n; x += kPanel<C>)
      for (int64_t r = 0; r < n; r += kGroup)
        if (first_panel(r) <= x && x < last_panel(r))
          product<C, false>(std::min(kGroup, n - r), depth, a + r * a_row, a_row, 1, panels + x * depth, kPanel<C>,
                            cells + r * stride + x, stride);
  }

  // cells <- (cells + of_rows + of_columns) * weights, zero beyond the diagonal, and their sums by row; any may be
  // null.
  void finish(const C* of_rows, const C* of_columns, const C* weights, C* cells, C* sums) const {
    constexpr int lanes = Simd<C>::lanes;
    for (int64_t r = 0; r < n; ++r) {
      Vec<C> sum = {};
      const Vec<C> more = splat(of_rows ? of_rows[r] : C{0});
      for (int64_t x = first_panel(r), end = last_panel(r); x < end; x += lanes) {
        C* const at = cells + r * stride + x;
        Vec<C> cell = load(at) + more;
        if (of_columns) cell += load(of_columns + x);
        if (weights) cell *= load(weights + r * stride + x);
        if (upper ? x < r : x + lanes > r + 1) {
          const Mask<C> below = lanes_below<C>(upper ? r - x : r + 1 - x);
          cell = upper ? (below ? Vec<C>{} : cell) : (below ? cell : Vec<C>{});
        }
        store(at, cell);
        sum += cell;
      }
      if (sums) sums[r] += sum_of(sum);
    }
  }

  // to [n, width] += cells b, of a lower triangle.
  void add_rows(const C* cells, int64_t width, const C* b, int64_t b_step, C* to) const {
    for (int64_t y = 0; y < width; y += kPanel<C>)
      for (int64_t r = 0; r < n; r += kGroup) {
        const int64_t rows = std::min(kGroup, n - r);
        product<C, true>(rows, r + rows, cells + r * stride, stride, 1, b + y, b_step, to + r * b_step + y, b_step);
      }
  }
  // to [n, width] += cells^T b, of a lower triangle.
  void add_columns(const C* cells, int64_t width, const C* b, int64_t b_step, C* to) const {
    for (int64_t y = 0; y < width; y += kPanel<C>)
      for (int64_t r = 0; r < n; r += kGroup)
        product<C, true>(std::min(kGroup, n - r), n - r, cells + r * stride + r, 1, stride, b + r * b_step + y, b_step,
                         to + r * b_step + y, b_step);
  }
  // to [rows, n] += a^T cells, where a is [n, rows].
  void add_transposed(int64_t rows, const C* a, int64_t a_step, const C* cells, C* to) const {
    for (int64_t x = 0; x < n; x += kPanel<C>) {
      const int64_t from = upper ? 0 : x, depth = (upper ? std::min(x + kPanel<C>, n) : n) - from;
      for (int64_t r = 0; r < rows; r += kGroup)
        product<C, true>(std::min(kGroup, rows - r), depth, a + from * a_step + r, 1, a_step, cells + from * stride + x,
                         stride, to + r * kBlock + x, kBlock);
    }
  }
};

}  // namespace
}  // namespace fastnlp
