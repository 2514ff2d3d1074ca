// The symmetric divergence of two runs of the same heads, and its gradients, tile by tile:
//     D = sum (sigma(s1) - sigma(s2)) (s1 - s2)
//     dD/ds1 = sigma(s1) - sigma(s2) + sigma(s1) (1 - sigma(s1)) (s1 - s2), and dD/ds2 by exchange
#pragma once
#include "global_pointer_gradients.h"

namespace fastnlp {
namespace {

// sigma(x) and sigma(x) (1 - sigma(x)), without overflow or cancellation at either end.
template <class C>
FASTNLP_INLINE void sigmoid(Vec<C> x, Vec<C>& value, Vec<C>& slope) {
  const Vec<C> one = splat(C{1});
  const Vec<C> small = exponential(x < Vec<C>{} ? x : -x);
  const Vec<C> large = one / (one + small);
  value = x < Vec<C>{} ? small * large : large;
  slope = small * large * large;
}

template <class C>
struct Pair {
  const Packed<C> packed[2];
  const int64_t heads;
  C* dots[2];
  C* cells[2];

  Pair(const SpanItem& one, const SpanItem& two, Arena& arena)
      : packed{Packed<C>(one), Packed<C>(two)}, heads(packed[0].p.heads_per_dot()) {
    for (int run = 0; run < 2; ++run) {
      dots[run] = arena.take<C>(Tile<C>::elements);
      cells[run] = packed[0].biases ? arena.take<C>(Tile<C>::elements) : dots[run];
    }
  }
  // cells <- scores of one head, zeros where not valid: such cells diverge by nothing.
  void score(const Tile<C>& tile, int64_t head) const {
    for (int run = 0; run < 2; ++run) {
      if (packed[run].biases)
        tile.add_bias(dots[run], packed[run].start_bias(head), packed[run].end_bias(head), cells[run]);
      tile.fill_invalid(cells[run], C{0});
    }
  }
};

template <class C>
void divergence(const SpanItem& one, const SpanItem& two, const SpanPart& part, void* scratch, SpanSums* sums) {
  Arena arena(scratch);
  const Pair<C> pair(one, two, arena);
  SpanSums* block = arena.take<SpanSums>(pair.heads);
  std::fill(sums, sums + pair.heads, SpanSums{});
  for (int64_t r = part.row0; r < part.row1; ++r) {
    std::fill(block, block + pair.heads, SpanSums{});
    each_column_block(*one.sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(pair.packed[0], r, c);
      tile.score(pair.dots[0]);
      Tile<C>(pair.packed[1], r, c).score(pair.dots[1]);
      for (int64_t h = 0; h < pair.heads; ++h) {
        pair.score(tile, h);
        Vec<C> sum = {};
        tile.each_vector([&](int64_t at) {
          const Vec<C> s1 = load(pair.cells[0] + at), s2 = load(pair.cells[1] + at);
          Vec<C> value1, value2, slope;
          sigmoid<C>(s1, value1, slope);
          sigmoid<C>(s2, value2, slope);
          sum += (value1 - value2) * (s1 - s2);
        });
        block[h].divergence += static_cast<double>(sum_of(sum));
      }
    });
    for (int64_t h = 0; h < pair.heads; ++h) add(sums[h], block[h]);
  }
}

template <class C>
void divergence_backward(const SpanItem& one, const SpanItem& two, const SpanPart& part, void* scratch) {
  Arena arena(scratch);
  const Pair<C> pair(one, two, arena);
  C* totals[2] = {arena.take<C>(Tile<C>::elements), arena.take<C>(Tile<C>::elements)};
  const Gradients<C> gradients[2] = {{pair.packed[0], part, arena}, {pair.packed[1], part, arena}};
  const GlobalPointerProblem& p = pair.packed[0].p;
  const C* ddivergence =
      static_cast<const C*>(one.work->dloss) + one.sequence->index * p.heads + pair.packed[0].head(0);
  for (int64_t r = part.row0; r < part.row1; ++r) {
    for (const Gradients<C>& sink : gradients) sink.clear_rows();
    each_column_block(*one.sequence, r, part, [&](int64_t c) {
      const Tile<C> tiles[2] = {{pair.packed[0], r, c}, {pair.packed[1], r, c}};
      for (int run = 0; run < 2; ++run) tiles[run].score(pair.dots[run]);
      for (int64_t h = 0; h < pair.heads; ++h) {
        pair.score(tiles[0], h);
        const Vec<C> scale = splat(ddivergence[h]);
        tiles[0].each_vector([&](int64_t at) {
          const Vec<C> s1 = load(pair.cells[0] + at), s2 = load(pair.cells[1] + at);
          Vec<C> value1, value2, slope1, slope2;
          sigmoid<C>(s1, value1, slope1);
          sigmoid<C>(s2, value2, slope2);
          store(pair.cells[0] + at, scale * (value1 - value2 + slope1 * (s1 - s2)));
          store(pair.cells[1] + at, scale * (value2 - value1 + slope2 * (s2 - s1)));
        });
        for (int run = 0; run < 2; ++run) {
          gradients[run].add_biases(tiles[run], h, pair.cells[run]);
          if (h == 0)
            tiles[run].each_vector([&](int64_t at) { store(totals[run] + at, load(pair.cells[run] + at)); });
          else
            tiles[run].add(pair.cells[run], totals[run]);
        }
      }
      for (int run = 0; run < 2; ++run) gradients[run].add_dots(tiles[run], totals[run]);
    });
    gradients[0].write_rows(r, *one.work);
    gradients[1].write_rows(r, *two.work);
  }
  gradients[0].write_columns(*one.work);
  gradients[1].write_columns(*two.work);
}

}  // namespace
}  // namespace fastnlp
