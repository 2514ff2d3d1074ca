// A tile of scores and the three products that meet in it. Every loop leaves out what no cell needs, in steps of six
// starts and one panel of ends: below the diagonal and outside max_span_length little is computed in vain.
#pragma once
#include "global_pointer_pack.h"

namespace fastnlp {
namespace {

template <class C>
constexpr C kNone = -static_cast<C>(INFINITY);

template <class C>
struct Tile {
  static constexpr int64_t stride = kSpanColumns + 16;  // not a power of two: columns would share a set of the cache
  static constexpr int64_t elements = kSpanRows * stride;

  const Packed<C>& packed;
  const SpanSequence& sequence;
  const int64_t row0;  // tokens
  const int64_t rows;
  const int64_t column0;
  const int64_t columns;              // whole panels
  const int64_t groups;               // of rows
  int64_t begin[kSpanRows / kGroup];  // columns of a group that are computed: whole panels, none where begin >= end
  int64_t end[kSpanRows / kGroup];

  Tile(const Packed<C>& packed, int64_t row_block, int64_t column_block)
      : packed(packed),
        sequence(packed.sequence),
        row0(row_block * kSpanRows),
        rows(std::min(kSpanRows, sequence.count - row0)),
        column0(column_block * kSpanColumns),
        columns(std::min(kSpanColumns, packed.padded - column0)),
        groups((rows + kGroup - 1) / kGroup) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = sequence.first[row0 + g * kGroup] - column0;
      const int64_t last = sequence.last[row0 + g * kGroup + group_rows(g) - 1] - column0;
      begin[g] = first <= 0 ? 0 : std::min(columns, first / kPanel<C> * kPanel<C>);
      end[g] = last <= 0 ? 0 : std::min(columns, padded_to_panel<C>(last));
    }
  }

  int64_t group_rows(int64_t g) const { return std::min(kGroup, rows - g * kGroup); }
  int64_t row_begin(int64_t r) const { return begin[r / kGroup]; }
  int64_t row_end(int64_t r) const { return end[r / kGroup]; }
  int64_t at(const SpanMark& mark) const { return (mark.start - row0) * stride + mark.end - column0; }

  // cells <- scores without biases, also of cells that are not valid.
  void score(C* cells) const {
    for (int64_t x = 0; x < columns; x += kPanel<C>)
      for (int64_t g = 0; g < groups; ++g)
        if (begin[g] <= x && x < end[g])
          product<C, false>(group_rows(g), packed.p.size, packed.q + (row0 + g * kGroup) * packed.width, packed.width,
                            1, packed.panels + (column0 + x) * packed.p.size, kPanel<C>,
                            cells + g * kGroup * stride + x, stride);
  }

  // to <- cells and the biases of one head; all of its tokens are given.
  void add_bias(const C* cells, const C* start_bias, const C* end_bias, C* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<C> start = splat(start_bias[row0 + r]);
      for (int64_t x = row_begin(r), stop = row_end(r); x < stop; x += Simd<C>::lanes)
        store(to + r * stride + x, load(cells + r * stride + x) + start + load(end_bias + column0 + x));
    }
  }

  void add(const C* cells, C* to) const {
    each_vector([&](int64_t at) { store(to + at, load(to + at) + load(cells + at)); });
  }

  C largest(const C* cells) const {
    Vec<C> most = splat(kNone<C>);
    each_vector([&](int64_t at) { most = maximum(most, load(cells + at)); });
    return max_of(most);
  }

  // f(index of a vector of cells) for all that are computed, row by row.
  template <class F>
  void each_vector(const F& f) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t x = row_begin(r), stop = row_end(r); x < stop; x += Simd<C>::lanes) f(r * stride + x);
  }

  // What is computed but not valid becomes `fill`.
  void fill_invalid(C* cells, C fill) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = row_begin(r), to = row_end(r);
      C* row = cells + r * stride;
      const int64_t first = std::min(std::max(sequence.first[row0 + r] - column0, from), to);
      const int64_t last = std::max(std::min(sequence.last[row0 + r] - column0, to), first);
      for (int64_t x = from; x < first; ++x) row[x] = fill;
      for (int64_t x = last; x < to; ++x) row[x] = fill;
    }
  }

  // dq [rows, width] += cells k
  void add_dq(const C* cells, C* dq) const {
    for (int64_t g = 0; g < groups; ++g) {
      if (begin[g] >= end[g]) continue;
      for (int64_t y = 0; y < packed.width; y += kPanel<C>)
        product<C, true>(group_rows(g), end[g] - begin[g], cells + g * kGroup * stride + begin[g], stride, 1,
                         packed.k + (column0 + begin[g]) * packed.width + y, packed.width,
                         dq + g * kGroup * packed.width + y, packed.width);
    }
  }

  // f(panel of columns, first row, rows) with the rows that are computed there.
  template <class F>
  void each_panel(const F& f) const {
    int64_t g0 = 0, g1 = 0;  // the groups that compute panel x: both rise with x
    for (int64_t x = 0; x < columns; x += kPanel<C>) {
      while (g0 < groups && end[g0] <= x) ++g0;
      while (g1 < groups && begin[g1] <= x) ++g1;
      if (g0 < g1) f(x, g0 * kGroup, std::min(g1 * kGroup, rows) - g0 * kGroup);
    }
  }

  // dk [columns, width] += cells^T q
  void add_dk(const C* cells, C* dk) const {
    each_panel([&](int64_t x, int64_t r, int64_t depth) {
      for (int64_t y = 0; y < packed.width; y += kPanel<C>)
        for (int64_t m = 0; m < kPanel<C>; m += kGroup)
          product<C, true>(std::min(kGroup, kPanel<C> - m), depth, cells + r * stride + x + m, 1, stride,
                           packed.q + (row0 + r) * packed.width + y, packed.width, dk + (x + m) * packed.width + y,
                           packed.width);
    });
  }

  // Gradients of biases: sums of the rows, sums of the columns.
  void add_sums(const C* cells, C* of_rows, C* of_columns) const {
    constexpr int lanes = Simd<C>::lanes;
    for (int64_t r = 0; r < rows; ++r) {
      Vec<C> sum = {};
      for (int64_t x = row_begin(r), stop = row_end(r); x < stop; x += lanes) {
        const Vec<C> cell = load(cells + r * stride + x);
        sum += cell;
        if (of_columns) store(of_columns + x, load(of_columns + x) + cell);
      }
      if (of_rows) of_rows[r] += sum_of(sum);
    }
  }
};

// f(column block) for those that a block of rows meets, ascending.
template <class F>
void each_column_block(const SpanSequence& sequence, int64_t row_block, const SpanPart& part, const F& f) {
  const int64_t row0 = row_block * kSpanRows;
  if (row0 >= sequence.count) return;
  const int64_t last_row = std::min(row0 + kSpanRows, sequence.count) - 1;
  const int64_t from = std::max<int64_t>(part.column0, sequence.first[row0] / kSpanColumns);
  const int64_t to = std::min<int64_t>(part.column1, (sequence.last[last_row] - 1) / kSpanColumns + 1);
  for (int64_t c = from; c < to; ++c) f(c);
}

}  // namespace
}  // namespace fastnlp
