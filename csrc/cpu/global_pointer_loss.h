// The loss of one head and its gradients, tile by tile:
//     log_negative = log(1 + sum_{not a label} e^s)      log_positive = log(1 + sum_{label} e^-s)
//     dL/ds = e^(s - log_negative), or -e^(-s - log_positive) of a label
// Labels are left out of the negative sum before it is taken; a sum over all cells minus that of the labels cancels.
#pragma once
#include "global_pointer_gradients.h"

namespace fastnlp {
namespace {

// Some of the marks of a tile.
struct TileMarks {
  const SpanMark* from;
  const SpanMark* to;

  TileMarks(const SpanItem& item, int64_t row_block, int64_t column_block) : from(nullptr), to(nullptr) {
    if (!item.marks.tiles) return;
    const int64_t* tile = item.marks.tiles + row_block * item.sequence->column_blocks() + column_block;
    from = item.marks.marks + tile[0];
    to = item.marks.marks + tile[1];
  }
  const SpanMark* begin() const { return from; }
  const SpanMark* end() const { return to; }
  int64_t count() const { return to - from; }
};

// What a row of the loss and its gradient are made of.
template <class C>
struct LossRow {
  C dloss;
  C log_negative;
  C log_positive;

  LossRow(const Packed<C>& packed, int64_t head) {
    const int64_t row = packed.sequence.index * packed.p.heads + packed.head(head);
    dloss = static_cast<const C*>(packed.work.dloss)[row];
    log_negative = static_cast<const C*>(packed.work.log_negative)[row];
    log_positive = static_cast<const C*>(packed.work.log_positive)[row];
  }
  C gradient(const SpanMark& mark, C score) const {
    if (!mark.positive) return 0;
    return -dloss * static_cast<C>(std::exp(-static_cast<double>(score) - static_cast<double>(log_positive)));
  }
};

// sum += sum e^score of a tile
template <class C>
void add_scores(LogSum& sum, const Tile<C>& tile, const C* cells) {
  const C top = tile.largest(cells);
  raise(sum, top);
  if (top == static_cast<C>(INFINITY)) return;
  const Vec<C> shift = splat(static_cast<C>(sum.top));
  Vec<C> total = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    Vec<C> row = {};
    for (int64_t x = tile.row_begin(r), stop = tile.row_end(r); x < stop; x += Simd<C>::lanes)
      row += exponential(load(cells + r * Tile<C>::stride + x) - shift);
    total += row;
  }
  sum.scaled += static_cast<double>(sum_of(total));
}

// Scores, -inf where not valid, become gradients. `memory`: as many C as there are marks.
template <class C>
void scores_to_gradients(const LossRow<C>& row, const Tile<C>& tile, const TileMarks& marks, C* cells, C* memory) {
  C* marked = memory;
  for (const SpanMark& mark : marks) {
    C& cell = cells[tile.at(mark)];
    *marked++ = row.gradient(mark, cell);
    cell = kNone<C>;
  }
  const Vec<C> shift = splat(row.log_negative), scale = splat(row.dloss);
  tile.each_vector([&](int64_t at) { store(cells + at, scale * exponential(load(cells + at) - shift)); });
  marked = memory;
  for (const SpanMark& mark : marks) cells[tile.at(mark)] = *marked++;
}

template <class C>
void score_valid(const Packed<C>& packed, const Tile<C>& tile, C* cells) {
  tile.score(cells);
  if (packed.biases) tile.add_bias(cells, packed.start_bias(0), packed.end_bias(0), cells);
  tile.fill_invalid(cells, kNone<C>);
}

template <class C>
void loss(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums* sums) {
  const Packed<C> packed(items[0]);
  C* const cells = Arena(scratch).take<C>(Tile<C>::elements);
  *sums = {};
  for (int64_t r = part.row0; r < part.row1; ++r) {
    SpanSums block;
    each_column_block(packed.sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(packed, r, c);
      score_valid(packed, tile, cells);
      for (const SpanMark& mark : TileMarks(items[0], r, c)) {
        C& cell = cells[tile.at(mark)];
        if (mark.positive) add(block.positive, -static_cast<double>(cell));
        cell = kNone<C>;
      }
      add_scores(block.negative, tile, cells);
    });
    merge(sums, &block, 1);
  }
}

template <class C>
void loss_backward(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums*) {
  const Packed<C> packed(items[0]);
  const LossRow<C> row(packed, 0);
  Arena arena(scratch);
  C* const cells = arena.take<C>(Tile<C>::elements);
  C* const marked = arena.take<C>(Tile<C>::elements);
  const Gradients<C> gradients(packed, part, arena);
  for (int64_t r = part.row0; r < part.row1; ++r) {
    gradients.clear_rows();
    each_column_block(packed.sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(packed, r, c);
      score_valid(packed, tile, cells);
      scores_to_gradients(row, tile, TileMarks(items[0], r, c), cells, marked);
      gradients.add_biases(tile, 0, cells);
      gradients.add_dots(tile, cells);
    });
    gradients.write_rows(r, packed.work);
  }
  gradients.write_columns(packed.work);
}

}  // namespace
}  // namespace fastnlp
