// The loss of many heads that share their dots S and differ by biases a and c of starts and ends. A tile of S costs one
// exponential for all heads: with peaks t, A and C of S, a and c in the tile,
//     E = e^(S - t)   U = e^(a - A)   V = e^(c - C)      sum_ij e^(S_ij + a_i + c_j) = e^(t + A + C) sum_i U_i (E V)_i
// and with w = dloss e^(t + A + C - log_negative)
//     da_i = w U_i (E V)_i      dc_j = w V_j (E^T U)_j      dS_ij = E_ij sum_heads w U_i V_j
// are products of matrices, heads side by side. Labels are left out where they would enter such a sum. A head whose
// peaks do not meet, so that its own scores are far below t + A + C, or with many labels, is computed by its scores.
#pragma once
#include "global_pointer_loss.h"

namespace fastnlp {
namespace {

constexpr int64_t kHeadChunk = 64;  // heads that enter dS at a time
constexpr int64_t kFewMarks = 8;    // labels of a head in a tile that are cheaper to leave out one by one
template <class C>
constexpr C kLowest = static_cast<C>(-1e30);  // a peak of nothing: finite, so that no difference is NaN

template <class C>
struct SharedPacked : Packed<C> {
  static constexpr int64_t panel = kPanel<C>;
  const int64_t heads;       // in whole panels; those that are none have weight 0
  C* const ends;             // [heads / panel, padded, panel]: V
  C* const end_peaks;        // [column blocks, heads]
  C* const ends_transposed;  // [padded / panel, heads, panel]: V, for gradients

  explicit SharedPacked(const SpanItem& item)
      : Packed<C>(item, false),
        heads(padded_to_panel<C>(this->p.heads)),
        ends(this->panels + this->padded * this->p.size),
        end_peaks(ends + this->padded * heads),
        ends_transposed(end_peaks + this->sequence.column_blocks() * heads) {}

  static int64_t elements(const GlobalPointerProblem& p, int64_t count, bool gradients) {
    const int64_t tokens = padded_to_panel<C>(count), heads = padded_to_panel<C>(p.heads);
    return Packed<C>::elements(p, count, false) + tokens * heads * (gradients ? 2 : 1) +
           (count / kSpanColumns + 1) * heads;
  }

  void pack(int64_t begin, int64_t end, bool gradients) const {
    Packed<C>::pack(begin, end);
    for (int64_t t = begin; t < end; t += kSpanColumns) {
      const int64_t stop = std::min(t + kSpanColumns, end);
      weigh(this->p.end_bias, t, stop, ends + t * panel, this->padded, end_peaks + t / kSpanColumns * heads);
      if (!gradients) continue;
      for (int64_t x = t; x < padded_to_panel<C>(stop); ++x)
        for (int64_t h = 0; h < heads; h += panel)
          for (int64_t l = 0; l < panel; ++l)
            ends_transposed[(x / panel * heads + h + l) * panel + x % panel] = ends[h * this->padded + x * panel + l];
    }
  }

  // Weights e^(bias - peak) of tokens begin .. end - 1, at to[h * stride + (t - begin) * panel + lane] for heads h +
  // lane; zeros up to the next panel of tokens.
  void weigh(const SpanTensor& tensor, int64_t begin, int64_t end, C* to, int64_t stride, C* peaks) const {
    std::fill(peaks, peaks + heads, kLowest<C>);
    with_stored<C>(this->p.dtype, [&](auto* type) {
      for (int64_t t = begin; t < end; ++t) {
        const auto* row = static_cast<decltype(type)>(tensor.data) + this->offset(tensor, t, 0);
        for (int64_t h = 0; h < heads; h += panel) {
          C* block = to + h * stride + (t - begin) * panel;
          for (int64_t l = 0; l < panel; ++l)
            block[l] = h + l < this->p.heads ? static_cast<C>(row[(h + l) * tensor.head_stride]) : kNone<C>;
          for (int64_t l = 0; l < panel; l += Simd<C>::lanes)
            store(peaks + h + l, maximum(load(peaks + h + l), load(block + l)));
        }
      }
    });
    for (int64_t h = 0; h < heads; h += panel) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t l = 0; l < panel; l += Simd<C>::lanes) {
          C* const weight = to + h * stride + (t - begin) * panel + l;
          store(weight, exponential(load(weight) - load(peaks + h + l)));
        }
      const int64_t rows = padded_to_panel<C>(end) - begin;
      std::fill(to + h * stride + (end - begin) * panel, to + h * stride + rows * panel, C{0});
    }
  }

  // Gradients at values[h * stride + (t - begin) * panel + lane] become rows of a bias's gradient; masked tokens in
  // between get zeros. `row`: memory for the heads.
  void write_heads(const C* values, int64_t stride, int64_t begin, int64_t end, C* row, void* to) const {
    const SpanSequence& sequence = this->sequence;
    const int64_t count = this->p.heads;
    with_stored<C>(this->p.dtype, [&](auto* type) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      S* const rows = static_cast<S*>(to) + sequence.index * this->p.length * count;
      int64_t next = sequence.owned_from(begin);
      const auto skip_to = [&](int64_t position) {
        for (; next < position; ++next) std::memset(rows + next * count, 0, static_cast<size_t>(count) * sizeof(S));
      };
      for (int64_t t = begin; t < end; ++t) {
        skip_to(sequence.position[t]);
        for (int64_t h = 0; h < heads; h += panel)
          std::copy_n(values + h * stride + (t - begin) * panel, panel, row + h);
        store_rounded(rows + next++ * count, count, row);
      }
      skip_to(sequence.owned_to(end, this->p.length));
    });
  }
};

// What one thread works with on a block of rows.
template <class C>
struct SharedRows {
  static constexpr int64_t panel = kPanel<C>, stride = Tile<C>::stride;
  const SharedPacked<C> packed;
  const int64_t heads;
  C* const dots;         // a tile of S, -inf where not valid
  C* const exponents;    // E
  C* const cells;        // of one head
  C* const starts;       // [heads / panel, kSpanRows, panel]: U
  C* const start_peaks;  // [heads]
  C* const sums;         // [kSpanRows, panel]: E V

  static int64_t elements(const GlobalPointerProblem& p) {
    return 3 * Tile<C>::elements + padded_to_panel<C>(p.heads) * (kSpanRows + 1) + kSpanRows * panel + 64;
  }

  SharedRows(const SpanItem& item, Arena& arena)
      : packed(item),
        heads(packed.heads),
        dots(arena.take<C>(Tile<C>::elements)),
        exponents(arena.take<C>(Tile<C>::elements)),
        cells(arena.take<C>(Tile<C>::elements)),
        starts(arena.take<C>(heads * kSpanRows)),
        start_peaks(arena.take<C>(heads)),
        sums(arena.take<C>(kSpanRows * panel)) {}

  void enter(int64_t row_block) const {
    const int64_t row0 = row_block * kSpanRows;
    if (row0 >= packed.sequence.count) return;
    packed.weigh(packed.p.start_bias, row0, std::min(row0 + kSpanRows, packed.sequence.count), starts, kSpanRows,
                 start_peaks);
  }
  // U of a panel of heads: rows of `panel`.
  const C* starts_of(int64_t h) const { return starts + h * kSpanRows; }
  const C* ends_of(int64_t h, const Tile<C>& tile) const {
    return packed.ends + h * packed.padded + tile.column0 * panel;
  }
  const C* end_peaks(const Tile<C>& tile) const { return packed.end_peaks + tile.column0 / kSpanColumns * heads; }

  // Fills dots and exponents; returns t.
  C score(const Tile<C>& tile) const {
    tile.score(dots);
    tile.fill_invalid(dots, kNone<C>);
    const C top = std::max(tile.largest(dots), kLowest<C>);
    tile.each_vector([&](int64_t at) { store(exponents + at, exponential(load(dots + at) - splat(top))); });
    return top;
  }

  // sums <- E V of a panel of heads, without the cells in `marks`, which are of these heads. What becomes of the lanes
  // in `unused` does not matter.
  void multiply_ends(const Tile<C>& tile, int64_t h, const TileMarks& marks, uint32_t unused) const {
    const C* const weights = ends_of(h, tile);
    for (int64_t g = 0; g < tile.groups; ++g) {
      C* const to = sums + g * kGroup * panel;
      if (tile.begin[g] < tile.end[g])
        product<C, false>(tile.group_rows(g), tile.end[g] - tile.begin[g],
                          exponents + g * kGroup * stride + tile.begin[g], stride, 1, weights + tile.begin[g] * panel,
                          panel, to, panel);
      else
        std::fill(to, to + tile.group_rows(g) * panel, C{0});
    }
    for (const SpanMark* mark = marks.from; mark < marks.to;) {
      const int64_t r = mark->start - tile.row0, lane = mark->head - h;
      if (unused >> lane & 1) {
        ++mark;
        continue;
      }
      C sum = 0;
      const SpanMark* next = mark;
      for (int64_t x = tile.row_begin(r), stop = tile.row_end(r); x < stop; ++x) {
        if (next < marks.to && next->head == mark->head && next->start == mark->start && next->end == tile.column0 + x)
          ++next;
        else
          sum += exponents[r * stride + x] * weights[x * panel + lane];
      }
      sums[r * panel + lane] = sum;
      mark = next;
    }
  }

  // cells <- scores of one head
  void score_head(const Tile<C>& tile, int64_t head) const {
    C start[kSpanRows], end[kSpanColumns];
    packed.read_bias(packed.p.start_bias, head, tile.row0, tile.row0 + tile.rows, start);
    packed.read_bias(packed.p.end_bias, head, tile.column0,
                     std::min(tile.column0 + tile.columns, packed.sequence.count), end);
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t x = tile.row_begin(r), stop = tile.row_end(r); x < stop; x += Simd<C>::lanes)
        store(cells + r * stride + x, load(dots + r * stride + x) + splat(start[r]) + load(end + x));
    tile.fill_invalid(cells, kNone<C>);
  }
  C score_at(const Tile<C>& tile, const SpanMark& mark) const {
    return dots[tile.at(mark)] + packed.bias(packed.p.start_bias, mark.start, mark.head) +
           packed.bias(packed.p.end_bias, mark.end, mark.head);
  }
};

// Takes the marks of heads below `head` from those of a tile.
static inline TileMarks take_below(TileMarks& marks, int64_t head) {
  TileMarks own = marks;
  while (marks.from < marks.to && marks.from->head < head) ++marks.from;
  own.to = marks.from;
  return own;
}
static inline TileMarks of_head(TileMarks marks, int64_t head) {
  take_below(marks, head);
  return take_below(marks, head + 1);
}
// Bit l is set where head h + l has more than a few marks.
static inline uint32_t with_many_marks(const TileMarks& marks, int64_t h) {
  uint32_t many = 0;
  for (const SpanMark* mark = marks.from; marks.to - mark > kFewMarks; ++mark)
    if (mark[kFewMarks].head == mark->head) many |= uint32_t{1} << (mark->head - h);
  return many;
}

}  // namespace
}  // namespace fastnlp
