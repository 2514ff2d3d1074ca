// From what decoding found, block by block, to sorted spans and their scores.
#pragma once
#include <numeric>

#include "global_pointer_plan.h"

namespace fastnlp {

// Sorted by sequence, head, start and end, from the hits of every block of starts: by block of ends, and within those
// by head, start and end. A block is sorted by counting, and its memory is given back. parallel(count, f) calls
// f(block).
template <class C, class Parallel>
std::tuple<Tensor, Tensor> sorted_spans(const GlobalPointerCall& call, const SpanPlan& plan,
                                        std::vector<std::vector<SpanHit<C>>>& blocks, const Parallel& parallel) {
  const GlobalPointerProblem& p = call.problem;
  const int64_t heads = p.heads_per_dot(), count = static_cast<int64_t>(blocks.size());
  const int64_t blocks_of_item = (p.length + kSpanRows - 1) / kSpanRows;
  std::vector<int64_t> first(count * heads);  // [block, head]: hits at first, and then the row of the first of them
  parallel(count, [&](int64_t block) {
    for (const SpanHit<C>& hit : blocks[block]) ++first[block * heads + hit.head];
  });
  int64_t total = 0;
  for (int64_t item = 0; item < p.items(); ++item)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t block = item * blocks_of_item; block < (item + 1) * blocks_of_item; ++block)
        total += std::exchange(first[block * heads + h], total);

  Tensor spans = new_tensor(call.q, {total, 4}, ScalarType::Long);
  Tensor scores = new_tensor(call.q, {total}, call.compute);
  int64_t* const span = spans.mutable_data_ptr<int64_t>();
  C* const score = scores.mutable_data_ptr<C>();
  parallel(count, [&](int64_t block) {
    std::vector<SpanHit<C>>& hits = blocks[block];
    if (hits.empty()) return;
    const int64_t item = block / blocks_of_item, b = item / p.dot_heads, dot_head = item % p.dot_heads;
    const int32_t* position = plan.positions(p, b);
    const int64_t row0 = block % blocks_of_item * kSpanRows;
    std::vector<int64_t> next(heads * kSpanRows);  // the row of the next hit of a head and start
    for (const SpanHit<C>& hit : hits) ++next[hit.head * kSpanRows + hit.start - row0];
    for (int64_t h = 0; h < heads; ++h) {
      int64_t row = first[block * heads + h];
      for (int64_t start = 0; start < kSpanRows; ++start) row += std::exchange(next[h * kSpanRows + start], row);
    }
    for (const SpanHit<C>& hit : hits) {
      const int64_t row = next[hit.head * kSpanRows + hit.start - row0]++;
      span[4 * row] = b;
      span[4 * row + 1] = dot_head * heads + hit.head;
      span[4 * row + 2] = position[hit.start];
      span[4 * row + 3] = position[hit.end];
      score[row] = hit.score;
    }
    std::vector<SpanHit<C>>().swap(hits);
  });
  return {spans, scores};
}

}  // namespace fastnlp
