// The loss of each head and its gradients, tile by tile:
//     log_negative = log(1 + sum_{not a label} e^s)      log_positive = log(1 + sum_{label} e^-s)
//     dL/ds = e^(s - log_negative), or -e^(-s - log_positive) of a label
// Labels are left out of the negative sum before it is taken; a sum over all cells minus that of the labels cancels.
#pragma once
#include "global_pointer_gradients.h"

namespace fastnlp {
namespace {

// The marks of a tile, and of one head in it.
struct TileMarks {
  const SpanMark* begin;
  const SpanMark* end;

  TileMarks(const SpanItem& item, int64_t row_block, int64_t column_block) : begin(nullptr), end(nullptr) {
    if (!item.marks.tiles) return;
    const int64_t* tile = item.marks.tiles + row_block * item.sequence->column_blocks() + column_block;
    begin = item.marks.marks + tile[0];
    end = item.marks.marks + tile[1];
  }
  // Those of the head; heads are asked for in their order.
  TileMarks next_head(int64_t head) {
    TileMarks own = *this;
    while (begin < end && begin->head <= head) ++begin;
    own.end = begin;
    return own;
  }
};

// sum += sum e^cell
template <class C>
void add_cells(LogSum& sum, const Tile<C>& tile, C* cells) {
  Vec<C> most = splat(kNone<C>);
  tile.each_vector([&](int64_t at) { most = maximum(most, load(cells + at)); });
  C top = max_of(most);
  if (top == static_cast<C>(INFINITY)) {
    sum.infinite = true;
    return;
  }
  raise(sum, top);
  const Vec<C> shift = splat(static_cast<C>(sum.top));
  Vec<C> total = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    Vec<C> row = {};
    for (int64_t x = tile.row_begin(r); x < tile.row_end(r); x += Simd<C>::lanes)
      row += exponential(load(cells + r * Tile<C>::stride + x) - shift);
    total += row;
  }
  sum.scaled += static_cast<double>(sum_of(total));
}

template <class C>
void loss(const SpanItem& item, const SpanPart& part, void* scratch, SpanSums* sums) {
  const Packed<C> packed(item);
  const int64_t heads = packed.p.heads_per_dot();
  Arena arena(scratch);
  C* dots = arena.take<C>(Tile<C>::elements);
  C* with_bias = arena.take<C>(Tile<C>::elements);
  SpanSums* block = arena.take<SpanSums>(heads);
  std::fill(sums, sums + heads, SpanSums{});
  for (int64_t r = part.row0; r < part.row1; ++r) {
    std::fill(block, block + heads, SpanSums{});
    each_column_block(packed.sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(packed, r, c);
      TileMarks marks(item, r, c);
      tile.score(dots);
      for (int64_t h = 0; h < heads; ++h) {
        C* cells = packed.biases ? with_bias : dots;
        if (packed.biases) tile.add_bias(dots, packed.start_bias(h), packed.end_bias(h), cells);
        tile.fill_invalid(cells, kNone<C>);
        const TileMarks own = marks.next_head(h);
        for (const SpanMark* mark = own.begin; mark < own.end; ++mark) {
          C& cell = cells[tile.at(*mark)];
          if (mark->positive) add(block[h].positive, -static_cast<double>(cell));
          cell = kNone<C>;
        }
        add_cells(block[h].negative, tile, cells);
      }
    });
    for (int64_t h = 0; h < heads; ++h) add(sums[h], block[h]);
  }
}

template <class C>
void loss_backward(const SpanItem& item, const SpanPart& part, void* scratch) {
  const Packed<C> packed(item);
  const GlobalPointerWork& work = packed.work;
  const int64_t heads = packed.p.heads_per_dot();
  const int64_t row = packed.sequence.index * packed.p.heads + packed.head(0);
  const C* dloss = static_cast<const C*>(work.dloss) + row;
  const C* log_negative = static_cast<const C*>(work.log_negative) + row;
  const C* log_positive = static_cast<const C*>(work.log_positive) + row;
  Arena arena(scratch);
  C* dots = arena.take<C>(Tile<C>::elements);
  C* with_bias = arena.take<C>(Tile<C>::elements);
  C* total = arena.take<C>(Tile<C>::elements);
  C* marked = arena.take<C>(kSpanRows * kSpanColumns);
  const Gradients<C> gradients(packed, part, arena);
  for (int64_t r = part.row0; r < part.row1; ++r) {
    gradients.clear_rows();
    each_column_block(packed.sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(packed, r, c);
      TileMarks marks(item, r, c);
      tile.score(dots);
      for (int64_t h = 0; h < heads; ++h) {
        C* cells = packed.biases ? with_bias : dots;
        if (packed.biases) tile.add_bias(dots, packed.start_bias(h), packed.end_bias(h), cells);
        tile.fill_invalid(cells, kNone<C>);
        const TileMarks own = marks.next_head(h);
        for (const SpanMark* mark = own.begin; mark < own.end; ++mark) {
          C& cell = cells[tile.at(*mark)];
          marked[mark - own.begin] =
              mark->positive ? -dloss[h] * static_cast<C>(std::exp(-static_cast<double>(cell) - log_positive[h])) : 0;
          cell = kNone<C>;
        }
        const Vec<C> shift = splat(log_negative[h]), scale = splat(dloss[h]);
        tile.each_vector([&](int64_t at) { store(cells + at, scale * exponential(load(cells + at) - shift)); });
        for (const SpanMark* mark = own.begin; mark < own.end; ++mark) cells[tile.at(*mark)] = marked[mark - own.begin];
        gradients.add_biases(tile, h, cells);
        if (heads == 1) {
          gradients.add_dots(tile, cells);
        } else if (h == 0) {
          tile.each_vector([&](int64_t at) { store(total + at, load(cells + at)); });
        } else {
          tile.add(cells, total);
        }
      }
      if (heads > 1) gradients.add_dots(tile, total);
    });
    gradients.write_rows(r, work);
  }
  gradients.write_columns(work);
}

}  // namespace
}  // namespace fastnlp
