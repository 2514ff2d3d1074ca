// One call of a linear attention kernel, described without torch.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fastnlp {

// Numbered as in csrc/ops.cpp.
enum class FeatureMap : int32_t { identity, elu_plus_one, relu, relu_squared, exponential, softmax, cosine_plus_one };

// A tensor [B, T, heads, D] of the problem's dtype; the D numbers are adjacent. Strides count elements, not bytes.
struct HeadTensor {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// Compute type C: double where q is double, else float.
//     sim[t, j] = scale * phi(q_t) . phi(k_j)      out_t = sum_j sim[t, j] v_j      (/ sum_j sim[t, j] where normalize)
struct LinearAttentionProblem {
  int64_t batch;       // B
  int64_t queries;     // Tq, of a batch
  int64_t keys;        // Tk
  int64_t sequences;   // N: B, or what is packed into a batch of one
  int64_t heads;       // H, a multiple of
  int64_t key_heads;   // Hkv
  int64_t key_size;    // Dk
  int64_t value_size;  // Dv
  DType dtype;         // of q, k and v

  HeadTensor q;  // [B, Tq, H, Dk]
  HeadTensor k;  // [B, Tk, Hkv, Dk]
  HeadTensor v;  // [B, Tk, Hkv, Dv]

  const Bool* key_padding_mask;  // [B, Tk], or null: every key is on
  const void* log_decay;         // C [Hkv] or, per_token, [B, T, Hkv]; null: none
  bool decay_per_token;
  const void* initial_kv;       // C [N, Hkv, F, Dv]; null: no initial state
  const void* initial_key_sum;  // C [N, Hkv, F]
  const void* initial_key_max;  // C [N, Hkv, Dk] of the maps with a maximum

  FeatureMap feature_map;
  bool causal;
  bool normalize;
  double scale;
  double eps;

  int64_t group() const { return heads / key_heads; }
  // Channels of phi: cosine+1 has a constant one in front, which makes the 1 of 1 + cos.
  int64_t constants() const { return feature_map == FeatureMap::cosine_plus_one ? 1 : 0; }
  int64_t features() const { return key_size + constants(); }
  bool has_maximum() const { return feature_map == FeatureMap::exponential || feature_map == FeatureMap::softmax; }
  bool divides() const { return normalize && feature_map != FeatureMap::softmax; }
  int64_t items() const { return sequences * key_heads; }
};

}  // namespace fastnlp
