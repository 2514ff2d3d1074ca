// The table of the linear attention kernels.
#include "linear_attention_ends.h"
#include "linear_attention_passes.h"
#include "linear_attention_step.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

template <class C>
LinearAttentionKernels table() {
  return {[](const LinearAttentionProblem& p) -> size_t { return (State<C>::bytes(p) + 63) / 64 * 64; },
          [](const LinearAttentionProblem& p) -> size_t { return Block<C>::bytes(p); },
          key_sums<C>,
          query_sums<C>,
          forward<C>,
          query_gradients<C>,
          key_gradients<C>,
          clear_state<C>,
          append<C>,
          initial_state<C>,
          final_state<C>,
          saved_state<C>,
          final_gradient<C>,
          total_gradient<C>,
          initial_gradient<C>,
          decay_gradient<C>,
          [](const LinearAttentionProblem& p) -> size_t { return Step<C>::bytes(p); },
          [](const LinearAttentionItem& item, void* scratch) { Step<C>(item, scratch).run(); }};
}

}  // namespace

LinearAttentionKernels linear_attention_kernels(DType dtype) {
  return dtype == DType::f64 ? table<double>() : table<float>();
}

}  // namespace FASTNLP_ISA
}  // namespace fastnlp
