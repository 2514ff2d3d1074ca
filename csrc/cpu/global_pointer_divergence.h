// The symmetric divergence of two runs of the same heads, and its gradients, tile by tile:
//     D = sum (sigma(s1) - sigma(s2)) (s1 - s2)
//     dD/ds1 = sigma(s1) - sigma(s2) + sigma(s1) (1 - sigma(s1)) (s1 - s2), and dD/ds2 by exchange
#pragma once
#include "global_pointer_gradients.h"

namespace fastnlp {
namespace {

template <class C>
struct Sigmoid {
  Vec<C> value;  // sigma(x)
  Vec<C> other;  // 1 - sigma(x)

  explicit Sigmoid(Vec<C> x) {
    const Vec<C> small = exponential(x < Vec<C>{} ? x : -x);
    const Vec<C> large = splat(C{1}) / (splat(C{1}) + small);
    value = x < Vec<C>{} ? small * large : large;
    other = x < Vec<C>{} ? large : small * large;
  }
  // sigma(x) - sigma(y), also where both are nearly 1
  Vec<C> minus(const Sigmoid& y) const { return value * y.other - y.value * other; }
};

template <class C>
struct Pair {
  const Packed<C> packed[2];
  const int64_t heads;
  C* dots[2];
  C* cells[2];

  Pair(const SpanItem* items, Arena& arena)
      : packed{Packed<C>(items[0]), Packed<C>(items[1])}, heads(packed[0].p.heads_per_dot()) {
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
void divergence(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums* sums) {
  Arena arena(scratch);
  const Pair<C> pair(items, arena);
  SpanSums* block = arena.take<SpanSums>(pair.heads);
  std::fill(sums, sums + pair.heads, SpanSums{});
  for (int64_t r = part.row0; r < part.row1; ++r) {
    std::fill(block, block + pair.heads, SpanSums{});
    each_column_block(*items[0].sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(pair.packed[0], r, c);
      tile.score(pair.dots[0]);
      Tile<C>(pair.packed[1], r, c).score(pair.dots[1]);
      for (int64_t h = 0; h < pair.heads; ++h) {
        pair.score(tile, h);
        Vec<C> sum = {};
        tile.each_vector([&](int64_t at) {
          const Vec<C> s1 = load(pair.cells[0] + at), s2 = load(pair.cells[1] + at);
          sum += Sigmoid<C>(s1).minus(Sigmoid<C>(s2)) * (s1 - s2);
        });
        block[h].divergence += static_cast<double>(sum_of(sum));
      }
    });
    merge(sums, block, pair.heads);
  }
}

template <class C>
void divergence_backward(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums*) {
  Arena arena(scratch);
  const Pair<C> pair(items, arena);
  C* totals[2] = {arena.take<C>(Tile<C>::elements), arena.take<C>(Tile<C>::elements)};
  const Gradients<C> gradients[2] = {{pair.packed[0], part, arena}, {pair.packed[1], part, arena}};
  const GlobalPointerProblem& p = pair.packed[0].p;
  const C* ddivergence =
      static_cast<const C*>(items[0].work->dloss) + items[0].sequence->index * p.heads + pair.packed[0].head(0);
  for (int64_t r = part.row0; r < part.row1; ++r) {
    for (const Gradients<C>& sink : gradients) sink.clear_rows();
    each_column_block(*items[0].sequence, r, part, [&](int64_t c) {
      const Tile<C> tiles[2] = {{pair.packed[0], r, c}, {pair.packed[1], r, c}};
      for (int run = 0; run < 2; ++run) tiles[run].score(pair.dots[run]);
      for (int64_t h = 0; h < pair.heads; ++h) {
        pair.score(tiles[0], h);
        const Vec<C> scale = splat(ddivergence[h]);
        tiles[0].each_vector([&](int64_t at) {
          const Vec<C> s1 = load(pair.cells[0] + at), s2 = load(pair.cells[1] + at);
          const Sigmoid<C> sigma1(s1), sigma2(s2);
          const Vec<C> difference = sigma1.minus(sigma2);
          store(pair.cells[0] + at, scale * (difference + sigma1.value * sigma1.other * (s1 - s2)));
          store(pair.cells[1] + at, scale * (sigma2.value * sigma2.other * (s2 - s1) - difference));
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
    for (const Gradients<C>& sink : gradients) sink.write_rows(r);
  }
  for (const Gradients<C>& sink : gradients) sink.write_columns();
}

}  // namespace
}  // namespace fastnlp
