// What csrc/cpu/global_pointer_ops.cpp calls: CPU kernels that take one matrix of dots (an item) or some of its blocks
// at a time. They are compiled for the baseline and for x86-64-v3, in a namespace each; global_pointer_kernels() of
// either fills the same table.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../global_pointer.h"
#include "log_sum.h"

namespace fastnlp {

// A tile of scores: starts by ends. It fits the first cache beside the operands that meet in it. Sums over tiles are
// added in the order of the tiles, so that no result depends on how items and blocks are dealt to threads.
constexpr int64_t kSpanRows = 48;
constexpr int64_t kSpanColumns = 96;

// A sequence without its masked tokens, which are never looked at. Token t of the others stands at position[t] of the
// padded sequence; as a start it pairs with the ends first[t] .. last[t] - 1. All three rise with t, whatever the mask.
struct SpanSequence {
  int64_t index;  // b
  int64_t count;
  const int32_t* position;  // [count]
  const int32_t* first;
  const int32_t* last;

  int64_t row_blocks() const { return count > 0 ? (count + kSpanRows - 1) / kSpanRows : 1; }
  int64_t column_blocks() const { return count > 0 ? (count + kSpanColumns - 1) / kSpanColumns : 1; }
  // Rows of the padded sequence from a block's first token to the next block's: with the masked ones in between, which
  // belong to it in outputs.
  int64_t owned_from(int64_t t) const { return t == 0 ? 0 : position[t]; }
  int64_t owned_to(int64_t t, int64_t length) const { return t >= count ? length : position[t]; }
};

// A cell that is not a plain negative one: a label, or neither negative nor label.
struct SpanMark {
  int32_t start;  // numbers of tokens, not positions
  int32_t end;
  int32_t head;  // among those of the item
  bool positive;
  double score;  // the loss leaves it here for the gradient
};

// Marks by tile, and within a tile by head, start and end: those of tile (r, c) are tiles[r * column_blocks + c] to
// the next.
struct SpanMarks {
  const int64_t* tiles = nullptr;
  SpanMark* marks = nullptr;
};

// C [1 or B, n, width] by position in the padded sequence, of the angle of each pair; null without RoPE.
struct SpanAngles {
  const void* cosines = nullptr;
  const void* sines = nullptr;
  int64_t width = 0;  // d / 2 in whole vectors
  bool per_sequence = false;
};

// Where the gradients by q, k and the biases are, [B, n, heads, ...].
struct SpanGradients {
  DType dtype = DType::f32;
  int64_t stride = 0;  // from a head to the next of dq, and of dk
  void* dq = nullptr;
  void* dk = nullptr;
  void* dstart_bias = nullptr;
  void* dend_bias = nullptr;
};

// Everything that the items of one call share. C arrays are void* here: C is the compute type of the problem.
struct GlobalPointerWork {
  GlobalPointerProblem problem;
  SpanAngles angles;

  void* scores = nullptr;         // [B, H, n, n] like q: scores writes it,
  const void* dscores = nullptr;  // scores_backward reads it

  const void* dloss = nullptr;         // C [B, H]: of the loss, or of the divergence
  const void* log_negative = nullptr;  // C [B, H]
  const void* log_positive = nullptr;

  double threshold = 0;  // of decode,
  void* hits = nullptr;  // which adds to these: std::vector<SpanHit<C>> [B, dot heads, blocks of n starts]

  SpanGradients gradients;
};

// What a kernel adds up over blocks of rows, in their order: of the loss of one head, or of its divergence.
struct SpanSums {
  LogSum negative;
  LogSum positive;
  double divergence = 0;
};

// A cell whose score is above the threshold.
template <class C>
struct SpanHit {
  int32_t head;   // among those of the item
  int32_t start;  // numbers of tokens, not positions
  int32_t end;
  C score;
};

struct SpanItem {
  const GlobalPointerWork* work;
  const SpanSequence* sequence;
  int64_t dot_head;
  void* packed;  // see packed_size
  SpanMarks marks;
};

// Blocks of an item, and what of them is wanted: sums, gradients by their starts, by their ends.
struct SpanPart {
  int64_t row0;
  int64_t row1;
  int64_t column0;
  int64_t column1;
  bool sums;
  bool starts;
  bool ends;
};

// One op, as the host calls it: packs the operands of an item, then runs parts of the item.
struct SpanOp {
  // Bytes of an item's packed operands, and of the scratch that a thread gives to `run` for `columns` blocks of ends.
  size_t (*packed_size)(const GlobalPointerProblem&, int64_t count);
  size_t (*scratch_size)(const GlobalPointerProblem&, int64_t columns);
  // Packs the tokens begin .. end - 1: whole blocks of columns, the last one to the end.
  void (*pack)(const SpanItem&, int64_t begin, int64_t end);
  // `items`: one, or the two of a divergence. Sums, one for each head of the item, are set where they are wanted;
  // gradients of a loss read them where they are not.
  void (*run)(const SpanItem* items, const SpanPart&, void* scratch, SpanSums*);
};

struct GlobalPointerKernels {
  SpanOp scores;
  SpanOp scores_backward;
  SpanOp loss;           // with dL/dloss = 1 where gradients are wanted, unless heads share their dots
  SpanOp loss_backward;  // of heads that do
  SpanOp divergence;
  SpanOp divergence_backward;
  SpanOp decode;
  // sums += those of the next blocks of rows, in the arithmetic in which kernels add up theirs.
  void (*merge)(SpanSums* sums, const SpanSums* next, int64_t heads);
  // The gradients of the loss of some sequences' tokens, begin .. end - 1 of all, times dloss.
  void (*weigh)(const GlobalPointerWork&, const SpanGradients& from, int64_t begin, int64_t end);
};

namespace baseline {
GlobalPointerKernels global_pointer_kernels(const GlobalPointerProblem&);
}
namespace v3 {
GlobalPointerKernels global_pointer_kernels(const GlobalPointerProblem&);
}

}  // namespace fastnlp
