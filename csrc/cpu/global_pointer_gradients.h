// Where the gradients of an item are summed up: of starts for one block of rows, of ends for all blocks of a part.
#pragma once
#include "global_pointer_tile.h"

namespace fastnlp {
namespace {

static inline void merge(SpanSums* sums, const SpanSums* next, int64_t heads) {
  for (int64_t h = 0; h < heads; ++h) {
    add(sums[h].negative, next[h].negative);
    add(sums[h].positive, next[h].positive);
    sums[h].divergence += next[h].divergence;
  }
}

template <class C>
struct Gradients {
  const Packed<C>& packed;
  const SpanPart& part;
  const int64_t heads;     // with biases: those of the item
  const int64_t columns0;  // tokens
  const int64_t columns;
  C* const dq;      // [kSpanRows, width]
  C* const dstart;  // [heads, kSpanRows]
  C* const dk;      // [columns, width]
  C* const dend;    // [heads, columns]

  static int64_t elements(const GlobalPointerProblem& p, int64_t column_blocks) {
    const int64_t heads = p.start_bias.data ? p.heads_per_dot() : 0;
    const int64_t tokens = kSpanRows + column_blocks * kSpanColumns;
    return tokens * (padded_to_panel<C>(p.size) + heads) + 64;
  }

  Gradients(const Packed<C>& packed, const SpanPart& part, Arena& arena)
      : packed(packed),
        part(part),
        heads(packed.biases ? packed.p.heads_per_dot() : 0),
        columns0(part.column0 * kSpanColumns),
        columns(part.ends ? std::min(part.column1 * kSpanColumns, packed.padded) - columns0 : 0),
        dq(arena.take<C>(kSpanRows * packed.width)),
        dstart(arena.take<C>(heads * kSpanRows)),
        dk(arena.take<C>(columns * packed.width)),
        dend(arena.take<C>(heads * columns)) {
    if (!part.ends) return;
    std::fill(dk, dk + columns * packed.width, C{0});
    std::fill(dend, dend + heads * columns, C{0});
  }

  void clear_rows() const {
    if (!part.starts) return;
    std::fill(dq, dq + kSpanRows * packed.width, C{0});
    std::fill(dstart, dstart + heads * kSpanRows, C{0});
  }
  void add_dots(const Tile<C>& tile, const C* cells) const {
    if (part.starts) tile.add_dq(cells, dq);
    if (part.ends) tile.add_dk(cells, dk + (tile.column0 - columns0) * packed.width);
  }
  void add_biases(const Tile<C>& tile, int64_t head, const C* cells) const {
    if (!heads) return;
    tile.add_sums(cells, part.starts ? dstart + head * kSpanRows : nullptr,
                  part.ends ? dend + head * columns + tile.column0 - columns0 : nullptr);
  }
  void write_rows(int64_t row_block) const {
    if (!part.starts) return;
    const int64_t row0 = row_block * kSpanRows;
    const int64_t row1 = std::min(row0 + kSpanRows, packed.sequence.count);
    packed.write_rows(dq, row0, row1, static_cast<C>(packed.p.scale), packed.work.gradients.dq);
    for (int64_t h = 0; h < heads; ++h)
      packed.write_bias(dstart + h * kSpanRows, h, row0, row1, packed.work.gradients.dstart_bias);
  }
  void write_columns() const {
    if (!part.ends) return;
    const int64_t column1 = std::min(part.column1 * kSpanColumns, packed.sequence.count);
    packed.write_rows(dk, columns0, column1, C{1}, packed.work.gradients.dk);
    for (int64_t h = 0; h < heads; ++h)
      packed.write_bias(dend + h * columns, h, columns0, column1, packed.work.gradients.dend_bias);
  }
};

}  // namespace
}  // namespace fastnlp
