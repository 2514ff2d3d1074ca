// Scores of spans and their gradients, tile by tile; and the table of all kernels of GlobalPointer.
#include "global_pointer_decode.h"
#include "global_pointer_divergence.h"
#include "global_pointer_loss.h"
#include "global_pointer_shared_loss.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

template <class C>
struct Scores {
  const Packed<C> packed;
  const GlobalPointerProblem& p;
  const SpanSequence& sequence;

  explicit Scores(const SpanItem& item) : packed(item), p(packed.p), sequence(packed.sequence) {}

  int64_t row_offset(int64_t of_item, int64_t position) const {
    return ((sequence.index * p.heads + packed.head(of_item)) * p.length + position) * p.length;
  }
  bool adjacent() const { return sequence.position[sequence.count - 1] - sequence.position[0] == sequence.count - 1; }

  // -inf wherever a block of rows has no valid cell, or everywhere where valid tokens do not stand side by side.
  template <class S>
  void fill_invalid(int64_t row_block, S* scores) const {
    const S none = rounded(kNone<C>, scores);
    const int64_t row0 = row_block * kSpanRows;
    const int64_t row1 = std::min(row0 + kSpanRows, sequence.count);
    for (int64_t h = 0; h < p.heads_per_dot(); ++h) {
      int64_t t = row0;
      for (int64_t i = sequence.owned_from(row0); i < sequence.owned_to(row1, p.length); ++i) {
        S* row = scores + row_offset(h, i);
        if (t < row1 && sequence.position[t] == i && adjacent()) {
          const int64_t first = sequence.position[sequence.first[t]];
          std::fill(row, row + first, none);
          std::fill(row + first + sequence.last[t] - sequence.first[t], row + p.length, none);
        } else {
          std::fill(row, row + p.length, none);
        }
        t += t < row1 && sequence.position[t] == i;
      }
    }
  }

  template <class S>
  void write(const Tile<C>& tile, int64_t of_item, const C* cells, S* scores) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t t = tile.row0 + r;
      const int64_t from = std::max<int64_t>(sequence.first[t], tile.column0);
      const int64_t count = std::min<int64_t>(sequence.last[t], tile.column0 + tile.columns) - from;
      if (count <= 0) continue;
      S* row = scores + row_offset(of_item, sequence.position[t]);
      const C* values = cells + r * Tile<C>::stride + from - tile.column0;
      if (adjacent())
        store_rounded(row + sequence.position[from], count, values);
      else
        for (int64_t x = 0; x < count; ++x) row[sequence.position[from + x]] = rounded(values[x], scores);
    }
  }

  // Zeros for what is not valid.
  template <class S>
  void read(const Tile<C>& tile, int64_t of_item, const S* scores, C* cells) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t t = tile.row0 + r;
      C* row = cells + r * Tile<C>::stride;
      std::fill(row + tile.row_begin(r), row + std::max(tile.row_begin(r), tile.row_end(r)), C{0});
      const S* from = scores + row_offset(of_item, sequence.position[t]);
      const int64_t first = std::max<int64_t>(sequence.first[t], tile.column0);
      const int64_t last = std::min<int64_t>(sequence.last[t], tile.column0 + tile.columns);
      if (adjacent()) {
        from += sequence.position[0];
        for (int64_t x = first; x < last; ++x) row[x - tile.column0] = from[x];
      } else {
        for (int64_t x = first; x < last; ++x) row[x - tile.column0] = from[sequence.position[x]];
      }
    }
  }
};

template <class C>
void scores(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums*) {
  const Scores<C> op(items[0]);
  const Packed<C>& packed = op.packed;
  Arena arena(scratch);
  C* cells = arena.take<C>(Tile<C>::elements);
  C* with_bias = arena.take<C>(Tile<C>::elements);
  with_stored<C>(op.p.dtype, [&](auto* type) {
    auto* to = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(type)>>*>(packed.work.scores);
    for (int64_t r = part.row0; r < part.row1; ++r) {
      op.fill_invalid(r, to);
      each_column_block(op.sequence, r, part, [&](int64_t c) {
        const Tile<C> tile(packed, r, c);
        tile.score(cells);
        if (!packed.biases) return op.write(tile, 0, cells, to);
        for (int64_t h = 0; h < op.p.heads_per_dot(); ++h) {
          tile.add_bias(cells, packed.start_bias(h), packed.end_bias(h), with_bias);
          op.write(tile, h, with_bias, to);
        }
      });
    }
  });
}

template <class C>
void scores_backward(const SpanItem* items, const SpanPart& part, void* scratch, SpanSums*) {
  const Scores<C> op(items[0]);
  Arena arena(scratch);
  C* total = arena.take<C>(Tile<C>::elements);
  C* cells = arena.take<C>(Tile<C>::elements);
  const Gradients<C> gradients(op.packed, part, arena);
  with_stored<C>(op.p.dtype, [&](auto* type) {
    const auto* dscores = static_cast<decltype(type)>(op.packed.work.dscores);
    for (int64_t r = part.row0; r < part.row1; ++r) {
      gradients.clear_rows();
      each_column_block(op.sequence, r, part, [&](int64_t c) {
        const Tile<C> tile(op.packed, r, c);
        for (int64_t h = 0; h < op.p.heads_per_dot(); ++h) {
          C* own = h ? cells : total;
          op.read(tile, h, dscores, own);
          gradients.add_biases(tile, h, own);
          if (h) tile.add(cells, total);
        }
        gradients.add_dots(tile, total);
      });
      gradients.write_rows(r);
    }
  });
  gradients.write_columns();
}

template <class C>
GlobalPointerKernels table(const GlobalPointerProblem& problem) {
  const SpanOp dense = {
      [](const GlobalPointerProblem& p, int64_t count) -> size_t {
        return static_cast<size_t>(Packed<C>::elements(p, count)) * sizeof(C);
      },
      [](const GlobalPointerProblem& p, int64_t columns) -> size_t {
        return static_cast<size_t>(6 * Tile<C>::elements + 2 * Gradients<C>::elements(p, columns)) * sizeof(C) +
               static_cast<size_t>(p.heads_per_dot()) * sizeof(SpanSums) + 64;
      },
      [](const SpanItem& item, int64_t begin, int64_t end) { Packed<C>(item).pack(begin, end); }, nullptr};
  const auto with = [](SpanOp op, auto run) {
    op.run = run;
    return op;
  };
  SpanOp own_loss = with(dense, loss<C>);
  own_loss.scratch_size = [](const GlobalPointerProblem& p, int64_t columns) -> size_t {
    return static_cast<size_t>(2 * Tile<C>::elements + LossGradients<C>::elements(p, columns)) * sizeof(C);
  };
  const bool shared = problem.heads_per_dot() > 1;
  return {with(dense, scores<C>),
          with(dense, scores_backward<C>),
          shared ? shared_loss_op<C, false>() : own_loss,
          shared ? shared_loss_op<C, true>() : SpanOp{},
          with(dense, divergence<C>),
          with(dense, divergence_backward<C>),
          with(dense, decode<C>),
          merge,
          weigh<C>};
}

}  // namespace

GlobalPointerKernels global_pointer_kernels(const GlobalPointerProblem& problem) {
  return problem.dtype == DType::f64 ? table<double>(problem) : table<float>(problem);
}

}  // namespace FASTNLP_ISA
}  // namespace fastnlp
