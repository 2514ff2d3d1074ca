// The two passes over what global_pointer_shared.h explains.
#pragma once
#include "global_pointer_shared.h"

namespace fastnlp {
namespace {

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
struct SharedLoss : SharedRows<C> {
  using Base = SharedRows<C>;
  using Base::panel, Base::heads, Base::packed;
  // A sum below kTiny of its scale may have lost terms. Then the scores decide, unless even kTiny e^scale is nothing
  // (e^-30) beside what is there already, e^top or up to a step less.
  static constexpr C kTiny = static_cast<C>(1e-20);
  static constexpr double kNegligible = 46 - 30 - kTopStep;
  double* const tops;    // [heads]: of the sums of this block of rows,
  double* const scaled;  // as in LogSum

  static int64_t bytes(const GlobalPointerProblem& p) {
    return Base::elements(p) * static_cast<int64_t>(sizeof(C)) + 2 * padded_to_panel<C>(p.heads) * 8 + 256 +
           p.heads * static_cast<int64_t>(sizeof(SpanSums));
  }
  SharedLoss(const SpanItem& item, Arena& arena)
      : Base(item, arena), tops(arena.take<double>(heads)), scaled(arena.take<double>(heads)) {}

  void add_tile(const Tile<C>& tile, TileMarks marks, SpanSums* block) const {
    const C top = this->score(tile);
    for (const SpanMark& mark : marks)
      if (mark.positive) add(block[mark.head].positive, -static_cast<double>(this->score_at(tile, mark)));
    const C* const end_peaks = this->end_peaks(tile);
    for (int64_t h = 0; h < heads; h += panel) {
      const TileMarks own = take_below(marks, h + panel);
      const uint32_t many = with_many_marks(own, h);
      this->multiply_ends(tile, h, own, many);
      alignas(32) C total[panel] = {}, before[panel], now[panel];
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t l = 0; l < panel; ++l) total[l] += this->starts_of(h)[r * panel + l] * this->sums[r * panel + l];
      uint32_t by_scores = many;
      for (int64_t l = 0; l < panel; ++l) {
        double& sum_top = tops[h + l];
        const double scale = static_cast<double>(top) + this->start_peaks[h + l] + end_peaks[h + l];
        const bool enough = total[l] >= kTiny && !(many >> l & 1);
        if (!enough && !(scale < sum_top + kNegligible)) by_scores |= uint32_t{1} << l;
        const double next = enough && scale > sum_top ? scale : sum_top;
        before[l] = next > sum_top ? static_cast<C>(sum_top - next) : 0;
        now[l] = enough ? static_cast<C>(scale - next) : kNone<C>;
        total[l] = enough ? total[l] : 0;
        sum_top = next;
      }
      for (int64_t l = 0; l < panel; l += Simd<C>::lanes) {
        store(before + l, exponential(load(before + l)));
        store(now + l, exponential(load(now + l)) * load(total + l));
      }
      for (int64_t l = 0; l < panel; ++l)
        scaled[h + l] = scaled[h + l] * static_cast<double>(before[l]) + static_cast<double>(now[l]);
      for (int64_t l = 0; l < panel && h + l < packed.p.heads; ++l)
        if (by_scores >> l & 1) add_head(tile, h + l, of_head(own, h + l));
    }
  }

  void add_head(const Tile<C>& tile, int64_t head, const TileMarks& marks) const {
    this->score_head(tile, head);
    for (const SpanMark& mark : marks) this->cells[tile.at(mark)] = kNone<C>;
    LogSum sum = {tops[head], scaled[head]};
    add(sum, exponentials(tile, this->cells));
    tops[head] = sum.top;
    scaled[head] = sum.scaled;
  }
};

template <class C>
void shared_loss(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums* sums) {
  Arena arena(scratch);
  const SharedLoss<C> op(items[0], arena);
  const int64_t heads = op.packed.p.heads;
  SpanSums* const block = arena.take<SpanSums>(heads);
  std::fill(sums, sums + heads, SpanSums{});
  for (int64_t r = part.row0; r < part.row1; ++r) {
    std::fill(block, block + heads, SpanSums{});
    std::fill(op.tops, op.tops + op.heads, 0.0);
    std::fill(op.scaled, op.scaled + op.heads, 0.0);
    op.enter(r);
    each_column_block(op.packed.sequence, r, part,
                      [&](int64_t c) { op.add_tile(Tile<C>(op.packed, r, c), TileMarks(items[0], r, c), block); });
    for (int64_t h = 0; h < heads; ++h) block[h].negative = {op.tops[h], op.scaled[h]};
    merge(sums, block, heads);
  }
}

template <class C>
struct SharedGradients : SharedRows<C> {
  using Base = SharedRows<C>;
  using Base::panel, Base::heads, Base::packed, Base::stride;
  static constexpr double kFar = 20;  // t + A + C above log_negative by more than this: the peaks do not meet

  const Gradients<C> dots_to;
  const int64_t columns;
  C* const gradients;  // a tile of dS
  C* const weights;    // [kSpanRows, kHeadChunk]: w U
  C* const products;   // [kSpanColumns, panel]: w E^T U
  C* const dstart;     // [heads / panel, kSpanRows, panel]
  C* const dend;       // [heads / panel, columns, panel]
  C* const row;        // [heads]
  C* const marked;     // a number for each mark of a tile and a head
  int32_t* const far;  // heads of a tile that are computed by their scores

  static int64_t bytes(const GlobalPointerProblem& p, int64_t column_blocks) {
    const int64_t heads = padded_to_panel<C>(p.heads);
    const int64_t elements = Base::elements(p) + Gradients<C>::elements(p, column_blocks) + 2 * Tile<C>::elements +
                             kSpanRows * kHeadChunk + kSpanColumns * panel +
                             heads * (kSpanRows + column_blocks * kSpanColumns + 2) + 256;
    return elements * static_cast<int64_t>(sizeof(C));
  }
  SharedGradients(const SpanItem& item, const SpanPart& part, Arena& arena)
      : Base(item, arena),
        dots_to(packed, part, arena),
        columns(dots_to.columns),
        gradients(arena.take<C>(Tile<C>::elements)),
        weights(arena.take<C>(kSpanRows * kHeadChunk)),
        products(arena.take<C>(kSpanColumns * panel)),
        dstart(arena.take<C>(heads * kSpanRows)),
        dend(arena.take<C>(heads * columns)),
        row(arena.take<C>(heads)),
        marked(arena.take<C>(Tile<C>::elements)),
        far(arena.take<int32_t>(heads)) {
    if (part.ends) std::fill(dend, dend + heads * columns, C{0});
  }

  void enter(int64_t row_block) const {
    Base::enter(row_block);
    dots_to.clear_rows();
    if (dots_to.part.starts) std::fill(dstart, dstart + heads * kSpanRows, C{0});
  }
  C* dstart_of(int64_t h) const { return dstart + h * kSpanRows; }
  C* dend_of(int64_t h, const Tile<C>& tile) const {
    return dend + h * columns + (tile.column0 - dots_to.columns0) * panel;
  }

  void add_tile(const Tile<C>& tile, const TileMarks& all) const {
    const C top = this->score(tile);
    TileMarks marks = all;
    int32_t* far_end = far;
    for (int64_t h0 = 0; h0 < heads; h0 += kHeadChunk) {
      const int64_t count = std::min(kHeadChunk, heads - h0);
      const TileMarks of_chunk = take_below(marks, h0 + count);
      TileMarks rest = of_chunk;
      uint64_t far_of_chunk = 0;
      for (int64_t h = h0; h < h0 + count; h += panel) {
        const TileMarks own = take_below(rest, h + panel);
        const uint32_t unused = weigh_starts(tile, top, h, with_many_marks(own, h), weights + h - h0);
        far_of_chunk |= static_cast<uint64_t>(unused) << (h - h0);
        for (int64_t l = 0; l < panel; ++l)
          if (unused >> l & 1) *far_end++ = static_cast<int32_t>(h + l);
        if (dots_to.part.starts) add_starts(tile, h, own, unused, weights + h - h0);
        if (dots_to.part.ends) add_ends(tile, h, own, unused, weights + h - h0);
      }
      add_dots(tile, h0, count, of_chunk, far_of_chunk);
    }
    C* const cells = gradients;
    tile.each_vector([&](int64_t at) { store(cells + at, load(cells + at) * load(this->exponents + at)); });
    const int32_t* next_far = far;
    for (const SpanMark& mark : all) {
      while (next_far < far_end && *next_far < mark.head) ++next_far;
      if (!mark.positive || (next_far < far_end && *next_far == mark.head)) continue;
      add_cell(tile, mark, LossRow<C>(packed, mark.head).gradient(mark, this->score_at(tile, mark)));
    }
    for (const int32_t* head = far; head < far_end; ++head) add_far(tile, *head, of_head(all, *head));
    dots_to.add_dots(tile, cells);
  }

  // weights <- w U of a panel of heads; returns the lanes that are to be computed by their scores, whose w is 0.
  uint32_t weigh_starts(const Tile<C>& tile, C top, int64_t h, uint32_t many, C* to) const {
    uint32_t unused = 0;
    alignas(32) C weight[panel], dloss[panel];
    for (int64_t l = 0; l < panel; ++l) {
      weight[l] = kNone<C>;
      dloss[l] = 0;
      if (h + l >= packed.p.heads) continue;
      const LossRow<C> row(packed, h + l);
      const double exponent = static_cast<double>(top) + this->start_peaks[h + l] + this->end_peaks(tile)[h + l] -
                              static_cast<double>(row.log_negative);
      if ((many >> l & 1) || !(exponent <= kFar)) {
        unused |= uint32_t{1} << l;
      } else {
        weight[l] = static_cast<C>(exponent);
        dloss[l] = row.dloss;
      }
    }
    for (int64_t l = 0; l < panel; l += Simd<C>::lanes) {
      const Vec<C> w = exponential(load(weight + l)) * load(dloss + l);
      for (int64_t r = 0; r < tile.rows; ++r)
        store(to + r * kHeadChunk + l, load(this->starts_of(h) + r * panel + l) * w);
    }
    return unused;
  }

  void add_starts(const Tile<C>& tile, int64_t h, const TileMarks& marks, uint32_t unused, const C* weighed) const {
    this->multiply_ends(tile, h, marks, unused);
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t l = 0; l < panel; ++l)
        dstart_of(h)[r * panel + l] += weighed[r * kHeadChunk + l] * this->sums[r * panel + l];
  }

  void add_ends(const Tile<C>& tile, int64_t h, const TileMarks& marks, uint32_t unused, const C* weighed) const {
    std::fill(products, products + tile.columns * panel, C{0});
    tile.each_panel([&](int64_t x, int64_t r, int64_t depth) {
      for (int64_t m = 0; m < panel; m += kGroup)
        product<C, false>(std::min(kGroup, panel - m), depth, this->exponents + r * stride + x + m, 1, stride,
                          weighed + r * kHeadChunk, kHeadChunk, products + (x + m) * panel, panel);
    });
    for (const SpanMark& mark : marks) {
      const int64_t lane = mark.head - h, x = mark.end - tile.column0;
      if (unused >> lane & 1) continue;
      uint64_t left_out = 0;
      for (const SpanMark& other : marks)
        if (other.head == mark.head && other.end == mark.end) left_out |= uint64_t{1} << (other.start - tile.row0);
      C sum = 0;
      for (int64_t r = 0; r < tile.rows; ++r)
        if (tile.row_begin(r) <= x && x < tile.row_end(r) && !(left_out >> r & 1))
          sum += this->exponents[r * stride + x] * weighed[r * kHeadChunk + lane];
      products[x * panel + lane] = sum;
    }
    const C* const ends = this->ends_of(h, tile);
    C* const to = dend_of(h, tile);
    for (int64_t at = 0; at < tile.columns * panel; ++at) to[at] += ends[at] * products[at];
  }

  // gradients += sum w U V over the heads of a chunk
  void add_dots(const Tile<C>& tile, int64_t h0, int64_t count, const TileMarks& marks, uint64_t unused) const {
    const auto used = [&](const SpanMark& mark) { return !(unused >> (mark.head - h0) & 1); };
    const auto ends = [&](int64_t x) {
      return packed.ends_transposed + ((tile.column0 + x) / panel * heads + h0) * panel;
    };
    C* saved = marked;
    for (const SpanMark& mark : marks)
      if (used(mark)) *saved++ = h0 == 0 ? 0 : gradients[tile.at(mark)];
    for (int64_t g = 0; g < tile.groups; ++g)
      for (int64_t x = tile.begin[g]; x < tile.end[g]; x += panel) {
        C* const to = gradients + g * kGroup * stride + x;
        const C* const from = weights + g * kGroup * kHeadChunk;
        if (h0 == 0)
          product<C, false>(tile.group_rows(g), count, from, kHeadChunk, 1, ends(x), panel, to, stride);
        else
          product<C, true>(tile.group_rows(g), count, from, kHeadChunk, 1, ends(x), panel, to, stride);
      }
    saved = marked;
    for (const SpanMark& mark : marks) {
      if (!used(mark)) continue;
      const C before = *saved++;
      uint64_t left_out = 0;
      bool first = true;
      for (const SpanMark& other : marks) {
        if (other.start != mark.start || other.end != mark.end || !used(other)) continue;
        left_out |= uint64_t{1} << (other.head - h0);
        first = first && other.head >= mark.head;
      }
      if (!first) continue;
      const int64_t r = mark.start - tile.row0, x = mark.end - tile.column0;
      C sum = before;
      for (int64_t l = 0; l < count; ++l)
        if (!(left_out >> l & 1)) sum += weights[r * kHeadChunk + l] * ends(x)[l * panel + x % panel];
      gradients[tile.at(mark)] = sum;
    }
  }

  void add_cell(const Tile<C>& tile, const SpanMark& mark, C gradient) const {
    const int64_t lane = mark.head % panel, h = mark.head - lane;
    gradients[tile.at(mark)] += gradient;
    if (dots_to.part.starts) dstart_of(h)[(mark.start - tile.row0) * panel + lane] += gradient;
    if (dots_to.part.ends) dend_of(h, tile)[(mark.end - tile.column0) * panel + lane] += gradient;
  }

  void add_far(const Tile<C>& tile, int64_t head, const TileMarks& marks) const {
    const int64_t lane = head % panel, h = head - lane;
    C of_rows[kSpanRows] = {}, of_columns[kSpanColumns] = {};
    this->score_head(tile, head);
    scores_to_gradients(LossRow<C>(packed, head), tile, marks, this->cells, marked);
    tile.add(this->cells, gradients);
    tile.add_sums(this->cells, of_rows, of_columns);
    for (int64_t r = 0; dots_to.part.starts && r < tile.rows; ++r) dstart_of(h)[r * panel + lane] += of_rows[r];
    for (int64_t x = 0; dots_to.part.ends && x < tile.columns; ++x) dend_of(h, tile)[x * panel + lane] += of_columns[x];
  }

  void write_rows(int64_t row_block) const {
    dots_to.write_rows(row_block);
    const int64_t row0 = row_block * kSpanRows;
    if (dots_to.part.starts)
      packed.write_heads(dstart, kSpanRows, row0, std::min(row0 + kSpanRows, packed.sequence.count), row,
                         packed.work.gradients.dstart_bias);
  }
  void write_columns() const {
    dots_to.write_columns();
    if (dots_to.part.ends)
      packed.write_heads(dend, columns, dots_to.columns0, std::min(dots_to.columns0 + columns, packed.sequence.count),
                         row, packed.work.gradients.dend_bias);
  }
};

template <class C>
void shared_loss_backward(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums*) {
  Arena arena(scratch);
  const SharedGradients<C> op(items[0], part, arena);
  for (int64_t r = part.row0; r < part.row1; ++r) {
    op.enter(r);
    each_column_block(op.packed.sequence, r, part,
                      [&](int64_t c) { op.add_tile(Tile<C>(op.packed, r, c), TileMarks(items[0], r, c)); });
    op.write_rows(r);
  }
  op.write_columns();
}

template <class C, bool GRADIENTS>
SpanOp shared_loss_op() {
  return {[](const GlobalPointerProblem& p, int64_t count) -> size_t {
            return static_cast<size_t>(SharedPacked<C>::elements(p, count, GRADIENTS)) * sizeof(C);
          },
          [](const GlobalPointerProblem& p, int64_t columns) -> size_t {
            return static_cast<size_t>(GRADIENTS ? SharedGradients<C>::bytes(p, columns) : SharedLoss<C>::bytes(p));
          },
          [](const SpanItem& item, int64_t begin, int64_t end) { SharedPacked<C>(item).pack(begin, end, GRADIENTS); },
          GRADIENTS ? shared_loss_backward<C> : shared_loss<C>};
}

}  // namespace
}  // namespace fastnlp
