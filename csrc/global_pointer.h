// One call of a GlobalPointer kernel, described without torch.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fastnlp {

// A tensor [B, n, heads, ...] of the problem's dtype. Strides count elements, not bytes.
struct SpanTensor {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// Compute type C: double where q is double, else float.
//     score[b, h, i, j] = scale * rope(q)[b, i, h] . rope(k)[b, j, h] + start_bias[b, i, h] + end_bias[b, j, h]
struct GlobalPointerProblem {
  int64_t batch;      // B
  int64_t length;     // n
  int64_t heads;      // H
  int64_t dot_heads;  // H, or 1 where all heads share their dots
  int64_t size;       // d, at least 1, even with RoPE
  DType dtype;        // of q, k and the biases

  SpanTensor q;  // [B, n, dot_heads, d], the d numbers are adjacent
  SpanTensor k;
  SpanTensor start_bias;  // [B, n, H]; data is null where there are no biases
  SpanTensor end_bias;

  const Bool* mask;             // [B, n] contiguous, or null: every token is on
  const int64_t* position_ids;  // [B, n] contiguous, or null: 0 .. n - 1
  bool rope;
  bool tril_mask;           // starts pair with ends at or behind them
  int64_t max_span_length;  // |end - start| is less than this; -1: any
  double scale;

  int64_t heads_per_dot() const { return heads / dot_heads; }
  int64_t items() const { return batch * dot_heads; }  // one matrix of dots each
};

}  // namespace fastnlp
