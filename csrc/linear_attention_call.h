// From the tensors of a linear attention op to a LinearAttentionProblem, with its checks and the shapes of its outputs.
#pragma once
#include <vector>

#include "checks.h"
#include "linear_attention.h"

namespace fastnlp {

// The options that the ops share, in the order of their schemas.
struct LinearAttentionOptions {
  std::optional<Tensor> key_padding_mask;
  std::optional<Tensor> cu_seqlens_q;
  std::optional<Tensor> cu_seqlens_k;
  std::optional<Tensor> log_decay;
  std::optional<Tensor> initial_kv;
  std::optional<Tensor> initial_key_sum;
  std::optional<Tensor> initial_key_max;
  int64_t feature_map;
  bool causal;
  bool normalize;
  double scale;
  double eps;
};

struct LinearAttentionCall {
  LinearAttentionProblem problem;
  ScalarType compute;  // Double where q is, else Float
  const Tensor& q;
  std::vector<int64_t> query_ends;  // where packed sequences start, and where the last one ends; else empty
  std::vector<int64_t> key_ends;

  LinearAttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const LinearAttentionOptions& options) : q(q) {
    LinearAttentionProblem& p = problem;
    p = {};
    check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, T, H, D], got ", shape_of(q), ", ",
          shape_of(k), " and ", shape_of(v));
    p.batch = q.size(0);
    p.queries = q.size(1);
    p.keys = k.size(1);
    p.sequences = p.batch;
    p.q = operand(q, "q", 4);
    p.k = operand(k, "k", 4);
    p.v = operand(v, "v", 4);
    heads(q.size(2), k.size(2), q.size(3), v.size(3));
    check_shape(k, "k", {p.batch, p.keys, p.key_heads, p.key_size});
    check_shape(v, "v", {p.batch, p.keys, p.key_heads, p.value_size});
    set_options(options);
    check(p.queries == p.keys || p.queries == 0 || !p.causal, "q must have as many tokens as k where causal, ", p.keys,
          ", got ", p.queries);
    check(!p.log_decay || p.causal, "log_decay must be None where causal is False");

    if (options.cu_seqlens_q || options.cu_seqlens_k) {
      check(p.batch == 1, "q must have one batch where sequences are packed, got ", shape_of(q));
      check(!p.key_padding_mask, "key_padding_mask must be None where sequences are packed");
      query_ends =
          ends(options.cu_seqlens_q ? *options.cu_seqlens_q : *options.cu_seqlens_k, "cu_seqlens_q", p.queries);
      key_ends = ends(options.cu_seqlens_k ? *options.cu_seqlens_k : *options.cu_seqlens_q, "cu_seqlens_k", p.keys);
      check(query_ends.size() == key_ends.size() && (!p.causal || query_ends == key_ends),
            "cu_seqlens_q and cu_seqlens_k must have the same ", p.causal ? "values where causal" : "length");
      p.sequences = static_cast<int64_t>(query_ends.size()) - 1;
    }
    set_state(options.initial_kv, options.initial_key_sum, options.initial_key_max);
  }

  // One token: q [B, H, Dk], k [B, Hkv, Dk], v [B, Hkv, Dv].
  LinearAttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& log_decay,
                      int64_t feature_map, bool normalize, double scale, double eps)
      : q(q) {
    LinearAttentionProblem& p = problem;
    p = {};
    check(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v must be [B, H, D], got ", shape_of(q), ", ",
          shape_of(k), " and ", shape_of(v));
    p.batch = p.sequences = q.size(0);
    p.queries = p.keys = 1;
    p.q = operand(q, "q", 3);
    p.k = operand(k, "k", 3);
    p.v = operand(v, "v", 3);
    heads(q.size(1), k.size(1), q.size(2), v.size(2));
    check_shape(k, "k", {p.batch, p.key_heads, p.key_size});
    check_shape(v, "v", {p.batch, p.key_heads, p.value_size});
    LinearAttentionOptions options = {};
    options.log_decay = log_decay;
    options.feature_map = feature_map;
    options.causal = true;
    options.normalize = normalize;
    options.scale = scale;
    options.eps = eps;
    set_options(options);
  }

  void heads(int64_t heads, int64_t key_heads, int64_t key_size, int64_t value_size) {
    LinearAttentionProblem& p = problem;
    p.heads = heads;
    p.key_heads = key_heads;
    p.key_size = key_size;
    p.value_size = value_size;
    check(key_heads >= 1 && heads >= 1 && heads % key_heads == 0, "q must have a multiple of the ", key_heads,
          " heads of k, got ", heads);
    check(key_size >= 1 && value_size >= 1, "q and v must have at least one channel, got ", key_size, " and ",
          value_size);
  }

  void set_options(const LinearAttentionOptions& options) {
    LinearAttentionProblem& p = problem;
    check(options.feature_map >= 0 && options.feature_map <= 6, "feature_map must be in 0 .. 6, got ",
          options.feature_map);
    p.feature_map = static_cast<FeatureMap>(options.feature_map);
    p.causal = options.causal;
    p.normalize = options.normalize;
    p.scale = options.scale;
    p.eps = options.eps;
    if (options.key_padding_mask) {
      check_dense(*options.key_padding_mask, "key_padding_mask", {p.batch, p.keys}, ScalarType::Bool, q);
      p.key_padding_mask = static_cast<const Bool*>(options.key_padding_mask->const_data_ptr());
    }
    if (!options.log_decay) return;
    const Tensor& decay = *options.log_decay;
    p.decay_per_token = decay.dim() != 1;
    check(!p.has_maximum(), "log_decay must be None with the feature maps exp and softmax");
    if (decay.dim() == 1)
      check_dense(decay, "log_decay", {p.key_heads}, compute, q);
    else if (q.dim() == 3)
      check_dense(decay, "log_decay", {p.batch, p.key_heads}, compute, q);
    else
      check_dense(decay, "log_decay", {p.batch, p.keys, p.key_heads}, compute, q);
    p.log_decay = decay.const_data_ptr();
  }

  void set_state(const std::optional<Tensor>& kv, const std::optional<Tensor>& key_sum,
                 const std::optional<Tensor>& key_max) {
    LinearAttentionProblem& p = problem;
    check(kv.has_value() == key_sum.has_value(), "initial_kv and initial_key_sum must be given together");
    if (!kv) return;
    p.initial_kv = state(*kv, "initial_kv", {p.sequences, p.key_heads, p.features(), p.value_size});
    p.initial_key_sum = state(*key_sum, "initial_key_sum", {p.sequences, p.key_heads, p.features()});
    if (!p.has_maximum()) return;
    check(key_max.has_value(), "initial_key_max must be given with the feature maps exp and softmax");
    p.initial_key_max = state(*key_max, "initial_key_max", {p.sequences, p.key_heads, p.key_size});
  }
  const void* state(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) const {
    check_dense(tensor, name, shape, compute, q);
    return tensor.const_data_ptr();
  }

  HeadTensor operand(const Tensor& tensor, const char* name, int64_t axes) {
    const DType dtype = dtype_of(tensor, name);
    if (&tensor == &q) {
      problem.dtype = dtype;
      compute = dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    }
    check(dtype == problem.dtype, name, " must be ", torch::headeronly::toString(q.scalar_type()), " like q, got ",
          torch::headeronly::toString(tensor.scalar_type()));
    check(tensor.device() == q.device(), name, " must be on the device of q");
    const bool adjacent = tensor.size(axes - 1) <= 1 || tensor.stride(axes - 1) == 1 || tensor.numel() == 0;
    check(adjacent, name, " must have adjacent channels (stride 1)");
    return {tensor.const_data_ptr(), tensor.stride(0), axes == 4 ? tensor.stride(1) : 0, tensor.stride(axes - 2)};
  }
  static void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    bool same = true;
    for (int64_t d = 0; d < tensor.dim(); ++d) same = same && tensor.size(d) == shape.begin()[d];
    check(same, name, " must have shape ", Sizes{shape}, ", got ", shape_of(tensor));
  }

  // Where packed sequences end; a CPU tensor.
  std::vector<int64_t> ends(const Tensor& tensor, const char* name, int64_t tokens) const {
    const bool wide = tensor.scalar_type() == ScalarType::Long;
    check(tensor.dim() == 1 && tensor.size(0) >= 1, name, " must be [N + 1], got ", shape_of(tensor));
    check_dense(tensor, name, {tensor.size(0)}, wide ? ScalarType::Long : ScalarType::Int, q);
    std::vector<int64_t> values(tensor.size(0));
    for (size_t n = 0; n < values.size(); ++n)
      values[n] = wide ? tensor.const_data_ptr<int64_t>()[n] : tensor.const_data_ptr<int32_t>()[n];
    bool rises = values.front() == 0 && values.back() == tokens;
    for (size_t n = 1; n < values.size(); ++n) rises = rises && values[n - 1] <= values[n];
    check(rises, name, " must rise from 0 to the number of tokens, ", tokens);
    return values;
  }

  Tensor like(const Tensor& tensor) const {
    return new_tensor(q, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, tensor.scalar_type());
  }
  Tensor out() const {
    const LinearAttentionProblem& p = problem;
    return new_tensor(q, {p.batch, p.queries, p.heads, p.value_size}, q.scalar_type());
  }
  Tensor normalizer() const {
    const LinearAttentionProblem& p = problem;
    return p.divides() ? new_tensor(q, {p.batch, p.queries, p.heads}, compute) : new_tensor(q, {0}, compute);
  }
  Tensor like_decay() const {
    const LinearAttentionProblem& p = problem;
    return p.decay_per_token ? new_tensor(q, {p.batch, p.keys, p.key_heads}, compute)
                             : new_tensor(q, {p.key_heads}, compute);
  }
  Tensor kv() const {
    const LinearAttentionProblem& p = problem;
    return new_tensor(q, {p.sequences, p.key_heads, p.features(), p.value_size}, compute);
  }
  Tensor key_sum() const { return new_tensor(q, {problem.sequences, problem.key_heads, problem.features()}, compute); }
  Tensor key_max() const {
    const LinearAttentionProblem& p = problem;
    return p.has_maximum() ? new_tensor(q, {p.sequences, p.key_heads, p.key_size}, compute)
                           : new_tensor(q, {0}, compute);
  }
};

}  // namespace fastnlp
