// The cells above a threshold, tile by tile: a product and a comparison that almost always fails.
#pragma once
#include <vector>

#include "global_pointer_tile.h"

namespace fastnlp {
namespace {

template <class C>
struct Decode {
  static constexpr int lanes = Simd<C>::lanes;
  const Tile<C>& tile;
  const C* const cells;
  const C threshold;
  std::vector<SpanHit<C>>& hits;

  bool any_above() const {
    Mask<C> above = {};
    tile.each_vector([&](int64_t at) { above |= load(cells + at) > splat(threshold); });
    return any(above);
  }

  // The largest score; NaN is passed over. Two of them by turns, because each waits for its last.
  C largest() const {
    Vec<C> most[2] = {splat(kNone<C>), splat(kNone<C>)};
    int turn = 0;
    tile.each_vector([&](int64_t at) {
      most[turn] = maximum(load(cells + at), most[turn]);
      turn ^= 1;
    });
    return max_of(maximum(most[0], most[1]));
  }

  // Rounding keeps order: where the largest dot with the largest biases is not above the threshold, no score is.
  static C largest(const C* bias, int64_t begin, int64_t end) {
    C most = kNone<C>;
    for (int64_t t = begin; t < end; ++t) most = bias[t] > most ? bias[t] : most;
    return most;
  }

  // add(cells + start + end) for whole vectors, as in Tile::add_bias; null pointers: no biases.
  void find(int64_t head, const C* start_bias, const C* end_bias) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* row = cells + r * Tile<C>::stride;
      const C* ends = end_bias ? end_bias + tile.column0 : nullptr;
      const Vec<C> start = splat(start_bias ? start_bias[tile.row0 + r] : C{0});
      const auto scores = [&](int64_t x) { return ends ? load(row + x) + start + load(ends + x) : load(row + x); };
      Mask<C> above = {};
      for (int64_t x = tile.row_begin(r); x < tile.row_end(r); x += lanes) above |= scores(x) > splat(threshold);
      if (!any(above)) continue;
      for (int64_t x = tile.row_begin(r); x < tile.row_end(r); x += lanes) {
        const Vec<C> found = scores(x);
        for (unsigned left = bits_of(found > splat(threshold)); left; left &= left - 1) {
          const int l = __builtin_ctz(left);
          hits.push_back({static_cast<int32_t>(head), static_cast<int32_t>(tile.row0 + r),
                          static_cast<int32_t>(tile.column0 + x + l), found[l]});
        }
      }
    }
  }
};

template <class C>
void decode(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums*) {
  const Packed<C> packed(items[0]);
  const GlobalPointerProblem& p = packed.p;
  const int64_t item = packed.sequence.index * p.dot_heads + packed.dot_head;
  auto* hits =
      static_cast<std::vector<SpanHit<C>>*>(packed.work.hits) + item * ((p.length + kSpanRows - 1) / kSpanRows);
  const C threshold = static_cast<C>(packed.work.threshold);
  C* cells = static_cast<C*>(scratch);
  for (int64_t r = part.row0; r < part.row1; ++r)
    each_column_block(packed.sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(packed, r, c);
      tile.score(cells);
      tile.fill_invalid(cells, kNone<C>);
      const Decode<C> op = {tile, cells, threshold, hits[r]};
      if (!packed.biases) {
        if (op.any_above()) op.find(0, nullptr, nullptr);
        return;
      }
      const C most = op.largest();
      for (int64_t h = 0; h < p.heads_per_dot(); ++h) {
        const C* start = packed.start_bias(h);
        const C* end = packed.end_bias(h);
        const C bound = most + op.largest(start, tile.row0, tile.row0 + tile.rows) +
                        op.largest(end, tile.column0, std::min(tile.column0 + tile.columns, packed.sequence.count));
        if (bound > threshold) op.find(h, start, end);
      }
    });
}

}  // namespace
}  // namespace fastnlp
