// Every op of the package on one screen. Kernels register themselves at the end of csrc/<device>/<family>_ops.cpp;
// fake kernels and autograd formulas are in fastnlp_ops/_ops/<family>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastnlp_ops, m) {
  // Linear-chain CRF. `messages` is what the backward pass needs beside the inputs (docs: csrc/cpu/crf.cpp). With
  // `check_start` a masked first step is an error on CPU, as in torchcrf.
  m.def(
      "crf_log_partition(Tensor emissions, Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, "
      "Tensor? mask, Tensor? cu_seqlens, bool save_messages) -> (Tensor log_partition, Tensor messages)");
  m.def(
      "crf_log_partition_backward(Tensor grad, Tensor messages, Tensor emissions, Tensor transitions, "
      "Tensor? start_transitions, Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens, bool transition_grad) -> "
      "(Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");
  m.def(
      "crf_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, Tensor? start_transitions, "
      "Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens, bool save_messages, bool check_start=False) -> "
      "(Tensor log_likelihood, Tensor messages)");
  m.def(
      "crf_log_likelihood_backward(Tensor grad, Tensor messages, Tensor emissions, Tensor tags, Tensor transitions, "
      "Tensor? start_transitions, Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens, bool transition_grad) -> "
      "(Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");
  m.def(
      "crf_viterbi(Tensor emissions, Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, "
      "Tensor? mask, Tensor? cu_seqlens, bool check_start=False) -> (Tensor paths, Tensor scores)");
  m.def(
      "crf_viterbi_n_best(Tensor emissions, Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, "
      "Tensor? mask, Tensor? cu_seqlens, int n_best) -> (Tensor paths, Tensor scores)");
  m.def(
      "crf_sample(Tensor emissions, Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, "
      "Tensor? mask, Tensor? cu_seqlens, Tensor uniforms) -> Tensor");
  m.def(
      "crf_entropy(Tensor emissions, Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, "
      "Tensor? mask, Tensor? cu_seqlens) -> Tensor");
  // Derivatives that have no kernel: the differentiable reference, as one node of a compiled graph.
  m.def(
      "crf_viterbi_backward(Tensor grad, Tensor paths, Tensor emissions, Tensor transitions, "
      "Tensor? start_transitions, Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens) -> "
      "(Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");
  m.def(
      "crf_entropy_backward(Tensor grad, Tensor emissions, Tensor transitions, Tensor? start_transitions, "
      "Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens) -> "
      "(Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");
  m.def(
      "crf_log_partition_double_backward(Tensor grad, Tensor? demissions_grad, Tensor? dtransitions_grad, "
      "Tensor? dstart_transitions_grad, Tensor? dend_transitions_grad, Tensor emissions, Tensor transitions, "
      "Tensor? start_transitions, Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens) -> "
      "(Tensor dgrad, Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");

  // Maximum-entropy Markov model.
  m.def(
      "memm_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, Tensor? mask, bool bidirectional) -> "
      "Tensor");
  m.def(
      "memm_log_likelihood_backward(Tensor grad, Tensor emissions, Tensor tags, Tensor transitions, Tensor? mask, "
      "bool bidirectional, bool transition_grad) -> (Tensor demissions, Tensor dtransitions)");

  // GlobalPointer. Options that every op takes alike are spelled once, in SPAN_OPTIONS. `cells` are the labels as
  // sorted flat indices ((b * H + h) * n + start) * n + end; duplicates stand side by side, B * H * n * n marks a
  // dropped label.
#define SPAN_OPTIONS                                                                                          \
  "Tensor? start_bias, Tensor? end_bias, Tensor? mask, Tensor? position_ids, bool rope, bool tril_mask, int " \
  "max_span_length, "                                                                                         \
  "float scale"
#define SPAN_GRADIENTS "(Tensor dq, Tensor dk, Tensor dstart_bias, Tensor dend_bias)"
  m.def("global_pointer_scores(Tensor q, Tensor k, " SPAN_OPTIONS ") -> Tensor");
  m.def("global_pointer_scores_backward(Tensor dscores, Tensor q, Tensor k, " SPAN_OPTIONS ") -> " SPAN_GRADIENTS);
  // `saved` is what the backward pass can use beside the inputs (global_pointer_ops.cpp); it may be empty.
  m.def("global_pointer_loss(Tensor q, Tensor k, Tensor cells, " SPAN_OPTIONS
        ", bool save_gradients) -> (Tensor log_negative, Tensor log_positive, Tensor saved)");
  m.def(
      "global_pointer_loss_backward(Tensor dloss, Tensor log_negative, Tensor log_positive, Tensor saved, Tensor q, "
      "Tensor k, Tensor cells, " SPAN_OPTIONS ") -> " SPAN_GRADIENTS);
  m.def(
      "global_pointer_divergence(Tensor q1, Tensor k1, Tensor? start_bias1, Tensor? end_bias1, Tensor q2, Tensor "
      "k2, " SPAN_OPTIONS ") -> Tensor");
  m.def(
      "global_pointer_divergence_backward(Tensor ddivergence, Tensor q1, Tensor k1, Tensor? start_bias1, "
      "Tensor? end_bias1, Tensor q2, Tensor k2, " SPAN_OPTIONS
      ") -> "
      "(Tensor dq1, Tensor dk1, Tensor dstart_bias1, Tensor dend_bias1, "
      "Tensor dq2, Tensor dk2, Tensor dstart_bias2, Tensor dend_bias2)");
  m.def(
      "global_pointer_cells(Tensor labels, Tensor? mask, SymInt batch, SymInt heads, SymInt length, "
      "bool tril_mask, int max_span_length, bool mask_zero) -> Tensor");
  m.def("global_pointer_decode(Tensor q, Tensor k, " SPAN_OPTIONS
        ", float threshold) -> (Tensor spans, Tensor scores)");
  // q is read for its sizes [B, n, ...]: torch 2.10 hands no symbolic ones to C++.
  m.def("flat_spans(Tensor spans, Tensor scores, Tensor q) -> Tensor");
#undef SPAN_OPTIONS
#undef SPAN_GRADIENTS

  // Multilabel cross entropy over dense scores.
  m.def(
      "multilabel_categorical_crossentropy(Tensor scores, Tensor labels) -> (Tensor log_negative, Tensor "
      "log_positive)");
  m.def(
      "multilabel_categorical_crossentropy_backward(Tensor dloss, Tensor log_negative, Tensor log_positive, "
      "Tensor scores, Tensor labels) -> Tensor");
  m.def(
      "sparse_multilabel_categorical_crossentropy(Tensor scores, Tensor indices) -> "
      "(Tensor log_negative, Tensor log_positive)");
  m.def(
      "sparse_multilabel_categorical_crossentropy_backward(Tensor dloss, Tensor log_negative, Tensor log_positive, "
      "Tensor scores, Tensor indices) -> Tensor");
  // Adafactor: one step of many parameters, in place (csrc/adafactor.h says what each argument holds).
  m.def(
      "adafactor_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] rows, Tensor(c!)[] cols, "
      "Tensor(d!)[] vectors, Tensor(e!)[] moments, Tensor(f!)[] averages, Tensor(g!) steps, Tensor(h!)? rms, "
      "Tensor lr, int[] group_of, float[] options, Tensor? grad_scale, Tensor? found_inf, float max_grad_norm, "
      "bool skip_nonfinite, int seed, int[] ids, Tensor(i!)? sums, int[] shards, int phases) -> ()");

  // Linear attention. feature_map: 0 identity, 1 elu+1, 2 relu, 3 relu^2, 4 exp, 5 softmax, 6 cosine+1. An empty tensor
  // stands for a result that does not apply. `normalizer` is what the backward pass needs beside inputs and output.
#define LINEAR_ATTENTION_OPTIONS                                                                                  \
  "Tensor? key_padding_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? log_decay, Tensor? initial_kv, " \
  "Tensor? initial_key_sum, Tensor? initial_key_max, int feature_map, bool causal, bool normalize, float scale, " \
  "float eps"
#define LINEAR_ATTENTION_GRADIENTS \
  "(Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_kv, Tensor dinitial_key_sum)"
  m.def("linear_attention(Tensor q, Tensor k, Tensor v, " LINEAR_ATTENTION_OPTIONS
        ") -> (Tensor out, Tensor normalizer, Tensor kv, Tensor key_sum, Tensor key_max)");
  m.def(
      "linear_attention_backward(Tensor? dout, Tensor? dkv, Tensor? dkey_sum, Tensor q, Tensor k, Tensor v, Tensor "
      "out, "
      "Tensor normalizer, Tensor kv, Tensor key_sum, Tensor key_max, " LINEAR_ATTENTION_OPTIONS
      ") -> " LINEAR_ATTENTION_GRADIENTS);
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!) key_sum, Tensor(c!)? key_max, "
      "Tensor? log_decay, int feature_map, bool normalize, float scale, float eps) -> Tensor");
#undef LINEAR_ATTENTION_OPTIONS
#undef LINEAR_ATTENTION_GRADIENTS
}
