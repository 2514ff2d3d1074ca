// The loss of one head and its gradients, tile by tile:
//     log_negative = log(1 + sum_{not a label} e^s)      log_positive = log(1 + sum_{label} e^-s)
//     dL/ds = e^(s - log_negative), or -e^(-s - log_positive) of a label
// One pass takes both: log_negative is only a factor of the gradients by q and k, which are summed up as e^(s - top)
// beside the loss and multiplied by e^(top - log_negative) in the end; labels enter then, one by one. Labels are left
// out of the negative sum before it is taken; a sum over all cells minus that of the labels cancels.
#pragma once
#include "global_pointer_gradients.h"

namespace fastnlp {
namespace {

// Some of the marks of a tile.
struct TileMarks {
  SpanMark* from;
  SpanMark* to;

  TileMarks(const SpanItem& item, int64_t row_block, int64_t column_block) : from(nullptr), to(nullptr) {
    if (!item.marks.tiles) return;
    const int64_t* tile = item.marks.tiles + row_block * item.sequence->column_blocks() + column_block;
    from = item.marks.marks + tile[0];
    to = item.marks.marks + tile[1];
  }
  SpanMark* begin() const { return from; }
  SpanMark* end() const { return to; }
  int64_t count() const { return to - from; }
};

// Tops are multiples of this, so that most tiles share theirs and their sums are added up as they are. It is small
// because s - top is rounded: by 2^-22 at most, within a step.
constexpr int kTopStep = 8;

// cells <- e^(score - top); returns their sum. The top is at least 0, and at least that of the scores.
template <class C>
LogSum exponentials(const Tile<C>& tile, C* cells) {
  const C most = tile.largest(cells);
  const C top = most > 0 ? std::ceil(most / kTopStep) * kTopStep : 0;
  Vec<C> total = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    Vec<C> row = {};
    for (int64_t x = tile.row_begin(r), stop = tile.row_end(r); x < stop; x += Simd<C>::lanes) {
      const Vec<C> power = exponential(load(cells + r * Tile<C>::stride + x) - splat(top));
      store(cells + r * Tile<C>::stride + x, power);
      row += power;
    }
    total += row;
  }
  return {top, top == static_cast<C>(INFINITY) ? 0 : sum_of(total)};
}

template <class C>
void score_valid(const Packed<C>& packed, const Tile<C>& tile, C* cells) {
  tile.score(cells);
  if (packed.biases) tile.add_bias(cells, packed.start_bias(0), packed.end_bias(0), cells);
  tile.fill_invalid(cells, kNone<C>);
}

// Sums of products with e^(s - top), for blocks of starts or of ends. Each block has a top of its own.
template <class C>
struct LossSums {
  const int64_t width;
  const int64_t block;  // tokens
  const int64_t first;  // blocks
  const int64_t last;
  C* const rows;    // [tokens, width]
  C* const biases;  // [tokens], or null
  C* const tops;    // [blocks]

  LossSums(const Packed<C>& packed, int64_t block, int64_t first, int64_t last, Arena& arena)
      : width(packed.width),
        block(block),
        first(first),
        last(last),
        rows(arena.take<C>(tokens() * width)),
        biases(packed.biases ? arena.take<C>(tokens()) : nullptr),
        tops(arena.take<C>(last - first)) {
    std::fill(rows, rows + tokens() * width, C{0});
    if (biases) std::fill(biases, biases + tokens(), C{0});
    std::fill(tops, tops + last - first, C{0});
  }
  int64_t tokens() const { return (last - first) * block; }
  C* row(int64_t token) const { return rows + (token - first * block) * width; }
  C* bias(int64_t token) const { return biases ? biases + token - first * block : nullptr; }

  void multiply(int64_t index, C factor) const {
    C* const own = row(index * block);
    for (int64_t x = 0; x < block * width; x += Simd<C>::lanes) store(own + x, load(own + x) * splat(factor));
    for (int64_t t = 0; biases && t < block; ++t) *bias(index * block + t) *= factor;
  }

  // Brings the sums of a block and e^(s - top) of a tile to the higher of their tops. Returns the cells, or lower ones
  // in `spare`.
  const C* level(int64_t index, const Tile<C>& tile, const C* cells, C top, C* spare) const {
    C& own = tops[index - first];
    if (own == top) return cells;
    const C factor = static_cast<C>(std::exp(-std::abs(static_cast<double>(own) - static_cast<double>(top))));
    if (own < top) {
      own = top;
      multiply(index, factor);
      return cells;
    }
    tile.each_vector([&](int64_t at) { store(spare + at, load(cells + at) * splat(factor)); });
    return spare;
  }

  void add_label(int64_t token, C gradient, const C* other) const {
    C* const own = row(token);
    for (int64_t x = 0; x < width; x += Simd<C>::lanes)
      store(own + x, load(own + x) + splat(gradient) * load(other + x));
    if (biases) *bias(token) += gradient;
  }

  void write(const Packed<C>& packed, C scale, void* to, void* to_bias) const {
    const int64_t begin = first * block, end = std::min(last * block, packed.sequence.count);
    packed.write_rows(rows, begin, end, scale, to);
    if (biases) packed.write_bias(biases, 0, begin, end, to_bias);
  }
};

template <class C>
struct LossGradients {
  const SpanItem& item;
  const Packed<C>& packed;
  const SpanPart& part;
  const LossSums<C> starts;
  const LossSums<C> ends;
  C* const spare;  // a tile

  // Beside the spare tile.
  static int64_t elements(const GlobalPointerProblem& p, int64_t column_blocks) {
    const int64_t tokens = kSpanRows + 2 * column_blocks * kSpanColumns;  // starts fill as many blocks as ends, or one
    return tokens * (padded_to_panel<C>(p.size) + 1) + 4 * column_blocks + 128;
  }

  LossGradients(const SpanItem& item, const Packed<C>& packed, const SpanPart& part, Arena& arena)
      : item(item),
        packed(packed),
        part(part),
        starts(packed, kSpanRows, part.row0, part.starts ? part.row1 : part.row0, arena),
        ends(packed, kSpanColumns, part.column0, part.ends ? part.column1 : part.column0, arena),
        spare(arena.take<C>(Tile<C>::elements)) {}

  // Cells are e^(s - top).
  void add(const Tile<C>& tile, int64_t row_block, int64_t column_block, const C* cells, C top) const {
    if (part.starts) {
      const C* own = starts.level(row_block, tile, cells, top, spare);
      tile.add_dq(own, starts.row(tile.row0));
      if (packed.biases) tile.add_sums(own, starts.bias(tile.row0), nullptr);
    }
    if (part.ends) {
      const C* own = ends.level(column_block, tile, cells, top, spare);
      tile.add_dk(own, ends.row(tile.column0));
      if (packed.biases) tile.add_sums(own, nullptr, ends.bias(tile.column0));
    }
  }

  void finish(double log_negative, double log_positive) const {
    for (const LossSums<C>* sums : {&starts, &ends})
      for (int64_t block = sums->first; block < sums->last; ++block) {
        const double top = sums->tops[block - sums->first];
        sums->multiply(block, top == log_negative ? 1 : static_cast<C>(std::exp(top - log_negative)));  // inf - inf: 1
      }
    for (int64_t r = part.row0; r < part.row1; ++r)
      each_column_block(packed.sequence, r, part, [&](int64_t c) {
        for (const SpanMark& mark : TileMarks(item, r, c)) {
          if (!mark.positive) continue;
          const C gradient = -static_cast<C>(std::exp(-mark.score - log_positive));
          if (part.starts) starts.add_label(mark.start, gradient, packed.k + mark.end * packed.width);
          if (part.ends) ends.add_label(mark.end, gradient, packed.q + mark.start * packed.width);
        }
      });
    const SpanGradients& to = packed.work.gradients;
    if (part.starts) starts.write(packed, static_cast<C>(packed.p.scale), to.dq, to.dstart_bias);
    if (part.ends) ends.write(packed, C{1}, to.dk, to.dend_bias);
  }
};

template <class C>
void loss(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums* sums) {
  const Packed<C> packed(items[0]);
  Arena arena(scratch);
  C* const cells = arena.take<C>(Tile<C>::elements);
  const LossGradients<C> gradients(items[0], packed, part, arena);
  if (part.sums) *sums = {};
  for (int64_t r = part.row0; r < part.row1; ++r) {
    SpanSums block;
    each_column_block(packed.sequence, r, part, [&](int64_t c) {
      const Tile<C> tile(packed, r, c);
      score_valid(packed, tile, cells);
      for (SpanMark& mark : TileMarks(items[0], r, c)) {
        C& cell = cells[tile.at(mark)];
        mark.score = cell;
        if (mark.positive) add(block.positive, -mark.score);
        cell = kNone<C>;
      }
      const LogSum sum = exponentials(tile, cells);
      add(block.negative, sum);
      gradients.add(tile, r, c, cells, static_cast<C>(sum.top));
    });
    if (part.sums) merge(sums, &block, 1);
  }
  if (!part.starts && !part.ends) return;
  const GlobalPointerWork& work = packed.work;
  const int64_t row = packed.sequence.index * packed.p.heads + packed.dot_head;
  // The caller wants no gradient of a sum that it calls infinite.
  const auto log_of = [&](const LogSum& sum, const void* given) {
    const bool none = given && static_cast<const C*>(given)[row] == static_cast<C>(INFINITY);
    return none ? static_cast<double>(INFINITY) : log_one_plus(&sum, 1);
  };
  gradients.finish(log_of(sums->negative, work.log_negative), log_of(sums->positive, work.log_positive));
}

template <class C>
void weigh(const GlobalPointerWork& work, const SpanGradients& from, int64_t begin, int64_t end) {
  const GlobalPointerProblem& p = work.problem;
  const SpanGradients& to = work.gradients;
  with_stored<C>(to.dtype, [&](auto* type) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t t = begin; t < end; ++t) {
      const bool on = !p.mask || p.mask[t];
      const auto put = [&](const void* values, int64_t from_at, int64_t count, C factor, void* gradient, int64_t at) {
        const C* const row = static_cast<const C*>(values) + from_at;
        S* const out = static_cast<S*>(gradient) + at;
        for (int64_t x = 0; x < count; ++x) out[x] = rounded(on ? row[x] * factor : C{0}, type);
      };
      for (int64_t h = 0; h < p.heads; ++h) {
        const C dloss = static_cast<const C*>(work.dloss)[t / p.length * p.heads + h];
        const int64_t at = t * p.heads + h;
        put(from.dq, at * from.stride, p.size, dloss, to.dq, at * to.stride);
        put(from.dk, at * from.stride, p.size, dloss, to.dk, at * to.stride);
        if (!p.start_bias.data) continue;
        put(from.dstart_bias, at, 1, dloss, to.dstart_bias, at);
        put(from.dend_bias, at, 1, dloss, to.dend_bias, at);
      }
    }
  });
}

}  // namespace
}  // namespace fastnlp
