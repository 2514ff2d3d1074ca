// From the tensors of a GlobalPointer op to a GlobalPointerProblem, with its checks and the shapes of its outputs.
#pragma once
#include "checks.h"
#include "global_pointer.h"

namespace fastnlp {

// The options that all ops share, in the order of their schemas.
struct SpanOptions {
  std::optional<Tensor> start_bias;
  std::optional<Tensor> end_bias;
  std::optional<Tensor> mask;
  std::optional<Tensor> position_ids;
  bool rope;
  bool tril_mask;
  int64_t max_span_length;
  double scale;
};

struct GlobalPointerCall {
  GlobalPointerProblem problem;
  ScalarType compute;  // Double where q is, else Float
  const Tensor& q;
  bool biased;  // empty biases have no data, and are there

  // `run`: "", or the number of the run of a divergence, as it stands behind the names of its tensors.
  GlobalPointerCall(const Tensor& q, const Tensor& k, const SpanOptions& options, const std::string& run = "")
      : q(q), biased(options.start_bias.has_value()) {
    GlobalPointerProblem& p = problem;
    const std::string q_name = "q" + run;
    check(q.dim() == 4, q_name, " must be [B, n, H, d], got ", shape_of(q));
    p.dtype = dtype_of(q, q_name.c_str());
    compute = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    p.batch = q.size(0);
    p.length = q.size(1);
    p.dot_heads = q.size(2);
    p.size = q.size(3);
    check(p.dot_heads >= 1 && p.size >= 1, q_name, " must have at least one head and one channel, got ", shape_of(q));
    check(p.length <= INT32_MAX, q_name, " must have fewer than 2^31 tokens, got ", shape_of(q));
    p.rope = options.rope;
    check(!p.rope || p.size % 2 == 0, q_name, " must have an even head size where rope is on, got ", shape_of(q));
    p.q = operand(q, q_name);
    p.k = operand(k, "k" + run);

    const std::string start_name = "start_bias" + run, end_name = "end_bias" + run;
    check(options.start_bias.has_value() == options.end_bias.has_value(), start_name, " and ", end_name,
          " must be given together");
    p.heads = p.dot_heads;
    if (biased) {
      const Tensor& start = *options.start_bias;
      if (p.heads == 1 && start.dim() == 3 && start.size(2) > 0) p.heads = start.size(2);
      p.start_bias = bias(start, start_name);
      p.end_bias = bias(*options.end_bias, end_name);
    }

    p.mask = nullptr;
    if (options.mask) {
      check_dense(*options.mask, "mask", {p.batch, p.length}, ScalarType::Bool, q);
      p.mask = static_cast<const Bool*>(options.mask->const_data_ptr());
    }
    p.position_ids = nullptr;
    if (options.position_ids) {
      check_dense(*options.position_ids, "position_ids", {p.batch, p.length}, ScalarType::Long, q);
      p.position_ids = options.position_ids->const_data_ptr<int64_t>();
    }
    p.tril_mask = options.tril_mask;
    p.max_span_length = options.max_span_length;
    check(p.max_span_length >= 1 || p.max_span_length == -1, "max_span_length must be at least 1, got ",
          p.max_span_length);
    p.scale = options.scale;
  }

  SpanTensor operand(const Tensor& tensor, const std::string& name) const {
    check_like(tensor, name, "[B, n, H, d]", {problem.batch, problem.length, problem.dot_heads, problem.size});
    const bool adjacent = tensor.size(3) == 1 || tensor.stride(3) == 1 || tensor.numel() == 0;
    check(adjacent, name, " must have adjacent channels (stride 1)");
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }
  SpanTensor bias(const Tensor& tensor, const std::string& name) const {
    check_like(tensor, name, "[B, n, H]", {problem.batch, problem.length, problem.heads});
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }
  void check_like(const Tensor& tensor, const std::string& name, const char* axes,
                  std::initializer_list<int64_t> shape) const {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    std::ostringstream wanted;
    int64_t d = 0;
    for (int64_t size : shape) {
      same = same && tensor.size(d) == size;
      wanted << (d++ ? ", " : "(") << size;
    }
    check(same, name, " must be ", axes, " = ", wanted.str(), "), got ", shape_of(tensor));
    check(tensor.scalar_type() == q.scalar_type(), name, " must be ", torch::headeronly::toString(q.scalar_type()),
          " like q, got ", torch::headeronly::toString(tensor.scalar_type()));
    check(tensor.device() == q.device(), name, " must be on the device of q");
  }

  // [B, H]: what a loss is made of, and its gradient.
  Tensor per_row() const { return new_tensor(q, {problem.batch, problem.heads}, compute); }
  const void* per_row(const Tensor& tensor, const char* name) const {
    check_dense(tensor, name, {problem.batch, problem.heads}, compute, q);
    return tensor.const_data_ptr();
  }
  Tensor like_q() const {
    return new_tensor(q, {problem.batch, problem.length, problem.dot_heads, problem.size}, q.scalar_type());
  }
  Tensor like_bias() const {
    if (!biased) return new_tensor(q, {0}, q.scalar_type());
    return new_tensor(q, {problem.batch, problem.length, problem.heads}, q.scalar_type());
  }
};

}  // namespace fastnlp
