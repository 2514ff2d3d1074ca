// Host side of the GlobalPointer ops on CPU: outputs, work for the threads, and calls of kernels for items and blocks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "global_pointer_spans.h"
#include "isa.h"

namespace fastnlp {
namespace {

using OptionalTensor = std::optional<Tensor>;

GlobalPointerKernels kernels_for(const GlobalPointerProblem& problem) {
  return use_v3() ? v3::global_pointer_kernels(problem) : baseline::global_pointer_kernels(problem);
}

struct Run {
  GlobalPointerCall call;
  SpanPlan plan;
  GlobalPointerKernels kernels;
  std::unique_ptr<SpanRotations> rotations;
  GlobalPointerWork works[2];  // the second of a divergence, which shares all but its operands with the first
  int64_t runs = 1;
  const int64_t* cells = nullptr;  // labels
  int64_t cell_count = 0;
  std::vector<SpanSums> sums;  // [B, H], of forward passes

  Run(const Tensor& q, const Tensor& k, const SpanOptions& options, const char* run = "")
      : call(q, k, options, run), plan(call.problem), kernels(kernels_for(call.problem)) {
    works[0].problem = call.problem;
    if (!call.problem.rope) return;
    rotations = std::make_unique<SpanRotations>(call.problem);
    works[0].angles = rotations->get();
  }

  void labels(const Tensor& tensor) {
    check(tensor.dim() == 1, "cells must be [M], got ", shape_of(tensor));
    check_dense(tensor, "cells", {tensor.size(0)}, ScalarType::Long, call.q);
    const GlobalPointerProblem& p = call.problem;
    int64_t all = p.length * p.length;  // n is below 2^31
    const bool fits = !__builtin_mul_overflow(all, p.batch, &all) && !__builtin_mul_overflow(all, p.heads, &all);
    check(fits, "q must have fewer than 2^63 cells [B, H, n, n], got ", shape_of(call.q));
    cells = tensor.const_data_ptr<int64_t>();
    cell_count = tensor.size(0);
  }

  // What a thread holds of one item.
  struct Held {
    SpanItem items[2];
    Memory packed;
    std::unique_ptr<SpanLabels> labels;
  };
  size_t packed_size(const SpanOp& op, const SpanSequence& sequence) const {
    return (op.packed_size(call.problem, sequence.count) + 63) / 64 * 64;
  }
  void hold(const SpanOp& op, int64_t index, Held* held) const {
    const int64_t dot_head = index % call.problem.dot_heads;
    const SpanSequence& sequence = plan.sequences[index / call.problem.dot_heads];
    char* const memory = static_cast<char*>(held->packed.get());
    if (cells) held->labels = std::make_unique<SpanLabels>(call.problem, plan, sequence, dot_head, cells, cell_count);
    for (int64_t r = 0; r < runs; ++r)
      held->items[r] = {&works[r], &sequence, dot_head, memory + r * packed_size(op, sequence),
                        cells ? held->labels->get() : SpanMarks{}};
  }

  // Runs the op on all blocks of all items. An item is a thread's own where there are enough of them; those that
  // are left are shared out by blocks of rows and then, for gradients, by blocks of rows and by blocks of columns.
  // Sums have one order.
  void each_item(const SpanOp& op, bool forward, bool gradients) {
    const GlobalPointerProblem& p = call.problem;
    const int64_t items = p.items(), heads = p.heads_per_dot();
    const int64_t threads = torch::stable::get_num_threads();
    if (forward) sums.resize(p.batch * p.heads);
    if (items == 0) return;
    const size_t size = runs * packed_size(op, plan.sequences[0]);
    const bool alone = runs * plan.cells * p.size < (int64_t{1} << 16);  // some 20 microseconds of work
    const bool nearly_even = items % threads * 4 >= threads * 3;
    const int64_t whole = alone || nearly_even ? items : items - items % threads;
    const auto sums_of = [&](const SpanItem& item) {
      return forward ? &sums[item.sequence->index * p.heads + item.dot_head * heads] : nullptr;
    };

    in_parallel(whole, alone, [&](Queue& queue) {
      Held held = {{}, Memory(size), {}};
      const Memory scratch(op.scratch_size(p, plan.sequences[0].column_blocks()));
      for (int64_t index; queue.take(&index);) {
        hold(op, index, &held);
        const SpanSequence& sequence = *held.items[0].sequence;
        for (int64_t r = 0; r < runs; ++r) op.pack(held.items[r], 0, sequence.count);
        const SpanPart all = {0, sequence.row_blocks(), 0, sequence.column_blocks(), forward, gradients, gradients};
        op.run(held.items, all, scratch.get(), sums_of(held.items[0]));
      }
    });

    for (int64_t index = whole; index < items; ++index) {
      Held held = {{}, Memory(size), {}};
      hold(op, index, &held);
      const SpanSequence& sequence = *held.items[0].sequence;
      const int64_t rows = sequence.row_blocks(), columns = sequence.column_blocks();
      in_parallel(columns, alone, [&](Queue& queue) {
        for (int64_t c; queue.take(&c);)
          for (int64_t r = 0; r < runs; ++r)
            op.pack(held.items[r], c * kSpanColumns, std::min((c + 1) * kSpanColumns, sequence.count));
      });
      SpanSums* const of_item = sums_of(held.items[0]);
      std::vector<SpanSums> blocks(rows * heads);
      const auto each_row_block = [&](bool with_sums, bool with_starts) {
        in_parallel(rows, alone, [&](Queue& queue) {
          const Memory scratch(op.scratch_size(p, 0));
          for (int64_t r; queue.take(&r);)
            op.run(held.items, SpanPart{r, r + 1, 0, columns, with_sums, with_starts, false}, scratch.get(),
                   with_sums ? &blocks[r * heads] : of_item);
        });
      };
      if (forward) each_row_block(true, false);
      for (int64_t r = 0; forward && r < rows; ++r) kernels.merge(of_item, &blocks[r * heads], heads);
      if (!gradients) continue;
      each_row_block(false, true);
      in_parallel(columns, alone, [&](Queue& queue) {
        const Memory scratch(op.scratch_size(p, 1));
        for (int64_t c; queue.take(&c);)
          op.run(held.items, SpanPart{0, rows, c, c + 1, false, false, true}, scratch.get(), of_item);
      });
    }
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> new_gradients(GlobalPointerWork& work) const {
    std::tuple<Tensor, Tensor, Tensor, Tensor> gradients = {call.like_q(), call.like_q(), call.like_bias(),
                                                            call.like_bias()};
    work.gradients = {call.problem.dtype,
                      call.problem.size,
                      std::get<0>(gradients).mutable_data_ptr(),
                      std::get<1>(gradients).mutable_data_ptr(),
                      std::get<2>(gradients).mutable_data_ptr(),
                      std::get<3>(gradients).mutable_data_ptr()};
    return gradients;
  }

  // The gradients of the loss in the compute type, one behind the other in one tensor: by q and k, side by side for
  // each token and head, by start_bias, by end_bias.
  int64_t saved_size() const {
    const GlobalPointerProblem& p = call.problem;
    return p.batch * p.length * p.heads * 2 * (p.size + call.biased);
  }
  SpanGradients in_saved(const Tensor& saved) const {
    const GlobalPointerProblem& p = call.problem;
    const int64_t bytes = p.dtype == DType::f64 ? 8 : 4, rows = p.batch * p.length * p.heads;
    char* const dq = static_cast<char*>(saved.mutable_data_ptr());
    char* const biases = dq + rows * 2 * p.size * bytes;
    return {p.dtype == DType::f64 ? DType::f64 : DType::f32,
            2 * p.size,
            dq,
            dq + p.size * bytes,
            biases,
            biases + rows * bytes};
  }
  // The gradients of the work become those that are saved times dloss.
  void weigh(const Tensor& dloss, const Tensor& saved) {
    works[0].dloss = call.per_row(dloss, "dloss");
    check_dense(saved, "saved", {saved_size()}, call.compute, call.q);
    parallel_for(0, call.problem.batch * call.problem.length, 64,
                 [&](int64_t begin, int64_t end) { kernels.weigh(works[0], in_saved(saved), begin, end); });
  }
  // Runs the loss; returns the gradients where they are wanted.
  Tensor loss(bool with_gradients) {
    Tensor saved = new_tensor(call.q, {with_gradients ? saved_size() : 0}, call.compute);
    if (with_gradients) works[0].gradients = in_saved(saved);
    each_item(kernels.loss, true, with_gradients);
    return saved;
  }

  // [B, H] from the sums of the rows.
  template <class F>
  Tensor per_row(const F& f) const {
    Tensor values = call.per_row();
    for (size_t row = 0; row < sums.size(); ++row) {
      if (call.compute == ScalarType::Double)
        values.mutable_data_ptr<double>()[row] = f(sums[row]);
      else
        values.mutable_data_ptr<float>()[row] = static_cast<float>(f(sums[row]));
    }
    return values;
  }
};

#define SPAN_OPTIONS                                                                            \
  const OptionalTensor &start_bias, const OptionalTensor &end_bias, const OptionalTensor &mask, \
      const OptionalTensor &position_ids, bool rope, bool tril_mask, int64_t max_span_length, double scale
#define SPAN_OPTION_VALUES \
  SpanOptions { start_bias, end_bias, mask, position_ids, rope, tril_mask, max_span_length, scale }

Tensor global_pointer_scores(const Tensor& q, const Tensor& k, SPAN_OPTIONS) {
  Run run(q, k, SPAN_OPTION_VALUES);
  const GlobalPointerProblem& p = run.call.problem;
  Tensor scores = new_tensor(q, {p.batch, p.heads, p.length, p.length}, q.scalar_type());
  run.works[0].scores = scores.mutable_data_ptr();
  run.each_item(run.kernels.scores, true, false);
  return scores;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> global_pointer_scores_backward(const Tensor& dscores, const Tensor& q,
                                                                          const Tensor& k, SPAN_OPTIONS) {
  Run run(q, k, SPAN_OPTION_VALUES);
  const GlobalPointerProblem& p = run.call.problem;
  check_dense(dscores, "dscores", {p.batch, p.heads, p.length, p.length}, q.scalar_type(), q);
  run.works[0].dscores = dscores.const_data_ptr();
  auto gradients = run.new_gradients(run.works[0]);
  run.each_item(run.kernels.scores_backward, false, true);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> global_pointer_loss(const Tensor& q, const Tensor& k, const Tensor& cells,
                                                       SPAN_OPTIONS, bool save_gradients) {
  Run run(q, k, SPAN_OPTION_VALUES);
  run.labels(cells);
  Tensor saved = run.loss(save_gradients && run.call.problem.heads_per_dot() == 1);
  return {run.per_row([](const SpanSums& sums) { return log_one_plus(&sums.negative, 1); }),
          run.per_row([](const SpanSums& sums) { return log_one_plus(&sums.positive, 1); }), saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> global_pointer_loss_backward(const Tensor& dloss, const Tensor& log_negative,
                                                                        const Tensor& log_positive, const Tensor& saved,
                                                                        const Tensor& q, const Tensor& k,
                                                                        const Tensor& cells, SPAN_OPTIONS) {
  Run run(q, k, SPAN_OPTION_VALUES);
  run.labels(cells);
  run.works[0].dloss = run.call.per_row(dloss, "dloss");
  run.works[0].log_negative = run.call.per_row(log_negative, "log_negative");
  run.works[0].log_positive = run.call.per_row(log_positive, "log_positive");
  if (run.call.problem.heads_per_dot() > 1) {
    auto gradients = run.new_gradients(run.works[0]);
    run.each_item(run.kernels.loss_backward, false, true);
    return gradients;
  }
  const Tensor unweighed = saved.numel() > 0 ? saved : run.loss(true);
  auto gradients = run.new_gradients(run.works[0]);
  run.weigh(dloss, unweighed);
  return gradients;
}

// The second run's operands join those of the first: same shapes, same options.
struct Divergence : Run {
  GlobalPointerCall second;

  Divergence(const Tensor& q1, const Tensor& k1, const OptionalTensor& start_bias1, const OptionalTensor& end_bias1,
             const Tensor& q2, const Tensor& k2, const SpanOptions& options)
      : Run(q1, k1, with_biases(options, start_bias1, end_bias1), "1"), second(q2, k2, options, "2") {
    const GlobalPointerProblem &one = call.problem, &two = second.problem;
    check(one.batch == two.batch && one.length == two.length && one.dot_heads == two.dot_heads && one.size == two.size,
          "q2 must have the shape of q1, ", shape_of(q1), ", got ", shape_of(q2));
    check(one.dtype == two.dtype, "q2 must be ", torch::headeronly::toString(q1.scalar_type()), " like q1, got ",
          torch::headeronly::toString(q2.scalar_type()));
    check(one.heads == two.heads && call.biased == second.biased,
          "start_bias1 and start_bias2 must have the same shape, or both be None");
    works[1] = works[0];
    works[1].problem = two;
    runs = 2;
  }
  static SpanOptions with_biases(SpanOptions options, const OptionalTensor& start, const OptionalTensor& end) {
    options.start_bias = start;
    options.end_bias = end;
    return options;
  }
};

Tensor global_pointer_divergence(const Tensor& q1, const Tensor& k1, const OptionalTensor& start_bias1,
                                 const OptionalTensor& end_bias1, const Tensor& q2, const Tensor& k2, SPAN_OPTIONS) {
  Divergence run(q1, k1, start_bias1, end_bias1, q2, k2, SPAN_OPTION_VALUES);
  run.each_item(run.kernels.divergence, true, false);
  return run.per_row([](const SpanSums& sums) { return sums.divergence; });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> global_pointer_divergence_backward(
    const Tensor& ddivergence, const Tensor& q1, const Tensor& k1, const OptionalTensor& start_bias1,
    const OptionalTensor& end_bias1, const Tensor& q2, const Tensor& k2, SPAN_OPTIONS) {
  Divergence run(q1, k1, start_bias1, end_bias1, q2, k2, SPAN_OPTION_VALUES);
  run.works[0].dloss = run.call.per_row(ddivergence, "ddivergence");
  const auto one = run.new_gradients(run.works[0]);
  const auto two = run.new_gradients(run.works[1]);
  run.each_item(run.kernels.divergence_backward, false, true);
  return std::tuple_cat(one, two);
}

template <class C>
std::tuple<Tensor, Tensor> decode(Run& run) {
  const GlobalPointerProblem& p = run.call.problem;
  std::vector<std::vector<SpanHit<C>>> hits(p.items() * ((p.length + kSpanRows - 1) / kSpanRows));
  run.works[0].hits = hits.data();
  run.each_item(run.kernels.decode, true, false);
  return sorted_spans(run.call, run.plan, hits, [&](int64_t count, const auto& f) {
    in_parallel(count, false, [&](Queue& queue) {
      for (int64_t block; queue.take(&block);) f(block);
    });
  });
}

std::tuple<Tensor, Tensor> global_pointer_decode(const Tensor& q, const Tensor& k, SPAN_OPTIONS, double threshold) {
  Run run(q, k, SPAN_OPTION_VALUES);
  run.works[0].threshold = threshold;
  return run.call.compute == ScalarType::Double ? decode<double>(run) : decode<float>(run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CPU, m) {
  m.impl("global_pointer_scores", TORCH_BOX(&global_pointer_scores));
  m.impl("global_pointer_scores_backward", TORCH_BOX(&global_pointer_scores_backward));
  m.impl("global_pointer_loss", TORCH_BOX(&global_pointer_loss));
  m.impl("global_pointer_loss_backward", TORCH_BOX(&global_pointer_loss_backward));
  m.impl("global_pointer_decode", TORCH_BOX(&global_pointer_decode));
  m.impl("global_pointer_divergence", TORCH_BOX(&global_pointer_divergence));
  m.impl("global_pointer_divergence_backward", TORCH_BOX(&global_pointer_divergence_backward));
}

}  // namespace fastnlp
