// What csrc/cpu/linear_attention_ops.cpp calls: CPU kernels that take a segment of one sequence and key head (an item)
// at a time. They are compiled for the baseline and for x86-64-v3, in a namespace each; linear_attention_kernels() of
// either fills the same table.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../linear_attention.h"

namespace fastnlp {

// Tokens that meet in a tile: whole panels and whole groups of rows (csrc/cpu/matmul.h). What is quadratic in it stays
// below what is quadratic in the head size.
constexpr int64_t kBlock = 48;

// A sum over tokens is made of sums over segments, which depend on the length alone: however segments are dealt to
// threads, the bits are the same. At most 64 of them, whose states must be held at once.
inline int64_t segment_length(int64_t tokens) {
  return std::max<int64_t>(11, (tokens + 64 * kBlock - 1) / (64 * kBlock)) * kBlock;
}
inline int64_t segment_count(int64_t tokens) {
  return std::max<int64_t>(1, (tokens + segment_length(tokens) - 1) / segment_length(tokens));
}

// Token t of its queries is row query0 + t of batch b.
struct LinearAttentionSequence {
  int64_t index;
  int64_t batch;
  int64_t query0;
  int64_t queries;
  int64_t key0;
  int64_t keys;
};

// Everything that the items of one call share. Tensors are contiguous, shapes as in csrc/ops.cpp.
struct LinearAttentionWork {
  LinearAttentionProblem problem;
  void* out = nullptr;         // [B, Tq, H, Dv] like v; backward passes read it
  void* normalizer = nullptr;  // C [B, Tq, H]: z, or of exp log z; null where nothing divides, or nobody asks
  void* kv = nullptr;          // the final state; backward passes read it
  void* key_sum = nullptr;
  void* key_max = nullptr;

  const void* dout = nullptr;  // null: zeros
  const void* dkv = nullptr;
  const void* dkey_sum = nullptr;
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  void* dz = nullptr;             // C [B, Tq, H]: the queries' pass leaves it to the keys'
  double* decay_terms = nullptr;  // [B, T, Hkv]: what dlog_decay is the reverse cumulative sum of
  void* dlog_decay = nullptr;     // C [B, T, Hkv]
  void* dinitial_kv = nullptr;
  void* dinitial_key_sum = nullptr;
};

struct LinearAttentionItem {
  const LinearAttentionWork* work;
  const LinearAttentionSequence* sequence;
  int64_t key_head;
};

// One segment of an item, tokens begin .. end - 1. `base`: the state that reaches it, or null: none does. `local`:
// where the segment's own sums go. `scratch`: memory of a thread.
using SegmentPass = void (*)(const LinearAttentionItem&, int64_t begin, int64_t end, const void* base, void* local,
                             void* scratch);

// States S = sum phi(k) v^T, sum phi(k) reach queries; their gradients dS = sum phi(q) dn^T, sum phi(q) dz reach keys.
struct LinearAttentionKernels {
  size_t (*state_size)(const LinearAttentionProblem&);
  size_t (*scratch_size)(const LinearAttentionProblem&);

  SegmentPass key_sums;
  SegmentPass query_sums;       // causal
  SegmentPass forward;          // causal: also the segment's key sums
  SegmentPass query_gradients;  // the same; or, not causal, the query sums
  SegmentPass key_gradients;    // causal: also the segment's query sums

  void (*clear_state)(const LinearAttentionProblem&, void* state);
  // state += the sums of the next segment; `first`: state holds nothing yet.
  void (*append)(const LinearAttentionProblem&, void* state, const void* local, bool first);
  // What a sweep begins with, and whether that is anything; what it ends with.
  bool (*initial_state)(const LinearAttentionItem&, void* state);
  void (*final_state)(const LinearAttentionItem&, const void* state);
  void (*saved_state)(const LinearAttentionItem&, void* state);
  bool (*final_gradient)(const LinearAttentionItem&, void* state);
  void (*total_gradient)(const LinearAttentionItem&, void* state);  // not causal: from the query sums
  void (*initial_gradient)(const LinearAttentionItem&, const void* state);
  // dlog_decay from decay_terms; returns its sum.
  double (*decay_gradient)(const LinearAttentionItem&);

  // One token of an item; kv, key_sum and key_max of the work move on.
  size_t (*step_scratch_size)(const LinearAttentionProblem&);
  void (*step)(const LinearAttentionItem&, void* scratch);
};

namespace baseline {
LinearAttentionKernels linear_attention_kernels(DType);
}
namespace v3 {
LinearAttentionKernels linear_attention_kernels(DType);
}

}  // namespace fastnlp
