// Every op of the package on one screen. Kernels register themselves at the end of csrc/<device>/<family>_ops.cpp;
// fake kernels and autograd formulas are in fastnlp_ops/_ops/<family>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastnlp_ops, m) {
  // Linear-chain CRF. `messages` is what the backward pass needs beside the inputs (docs: csrc/cpu/crf.cpp).
  m.def(
      "crf_log_partition(Tensor emissions, Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, "
      "Tensor? mask, Tensor? cu_seqlens, bool save_messages) -> (Tensor log_partition, Tensor messages)");
  m.def(
      "crf_log_partition_backward(Tensor grad, Tensor messages, Tensor emissions, Tensor transitions, "
      "Tensor? start_transitions, Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens, bool transition_grad) -> "
      "(Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");
  m.def(
      "crf_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, Tensor? start_transitions, "
      "Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens, bool save_messages) -> "
      "(Tensor log_likelihood, Tensor messages)");
  m.def(
      "crf_log_likelihood_backward(Tensor grad, Tensor messages, Tensor emissions, Tensor tags, Tensor transitions, "
      "Tensor? start_transitions, Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens, bool transition_grad) -> "
      "(Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");
  m.def(
      "crf_viterbi(Tensor emissions, Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, "
      "Tensor? mask, Tensor? cu_seqlens) -> (Tensor paths, Tensor scores)");
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
      "crf_double_backward(Tensor grad, Tensor? demissions_grad, Tensor? dtransitions_grad, "
      "Tensor? dstart_transitions_grad, Tensor? dend_transitions_grad, Tensor emissions, Tensor? tags, "
      "Tensor transitions, Tensor? start_transitions, Tensor? end_transitions, Tensor? mask, Tensor? cu_seqlens) -> "
      "(Tensor dgrad, Tensor demissions, Tensor dtransitions, Tensor dstart_transitions, Tensor dend_transitions)");

  // Maximum-entropy Markov model.
  m.def(
      "memm_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, Tensor? mask, bool bidirectional) -> "
      "Tensor");
  m.def(
      "memm_log_likelihood_backward(Tensor grad, Tensor emissions, Tensor tags, Tensor transitions, Tensor? mask, "
      "bool bidirectional, bool transition_grad) -> (Tensor demissions, Tensor dtransitions)");

  // Adafactor: one step of many parameters, in place (csrc/adafactor.h says what each argument holds).
  m.def(
      "adafactor_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] rows, Tensor(c!)[] cols, "
      "Tensor(d!)[] vectors, Tensor(e!)[] moments, Tensor(f!)[] averages, Tensor(g!) steps, Tensor(h!)? rms, "
      "Tensor lr, int[] group_of, float[] options, Tensor? grad_scale, Tensor? found_inf, float max_grad_norm, "
      "bool skip_nonfinite, int seed, int[] ids, Tensor(i!)? sums, int[] shards, int phases) -> ()");
}
