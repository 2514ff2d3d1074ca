// Log-partition, log-likelihood and their gradients for one sequence: filter from both ends, smooth from the middle.
//
// filter: two chains walk towards the middle edge (m-1, m), the left one over T, the right one over T transposed:
//     a_0 = start + e_0,          a_k(j) = e_k(j) + log sum_i exp(a_{k-1}(i) + T_ij),   k < m
//     b_{L-1} = end + e_{L-1},    b_k(i) = e_k(i) + log sum_j exp(b_{k+1}(j) + T_ij),   k >= m
//     log Z = log sum_ij exp(a_{m-1}(i) + T_ij + b_m(j))
// Neither needs the other, so the processor runs both at once: each hides the other's latency. `messages` keeps a and
// b up to a factor of their own: as many numbers as there are emissions, and all that the backward pass needs.
//
// smooth: the marginals gamma_m at the middle follow from the join; from there they walk back through the posterior
// kernels P(i | j) = p_i E_ij / s_j, with p = exp(a_{k-1}), E_ij = exp(T_ij - top_j), s_j = sum_i p_i E_ij:
//     gamma_{k-1}(i) = sum_j gamma_k(j) P(i | j),     xi_ij = gamma_k(j) P(i | j) = the gradient of T at this edge
// Everything is a probability, so nothing overflows where alpha and beta disagree (products of the two give NaN there).
#include "crf_decode.h"
#include "crf_lanes.h"
#include "crf_lanes_viterbi.h"
#include "crf_side.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

// left.a <- the joint of the middle edge seen from its later end (or of the only step), normalised; returns the
// logarithm of its sum.
template <class C, int BLOCK>
double join(Side<C, BLOCK>& left, Side<C, BLOCK>& right, int64_t length, int64_t middle) {
  if (length > 1) {
    left.enter(middle);
    right.logarithms();
    std::memcpy(left.e, right.a, static_cast<size_t>(left.padded) * sizeof(C));
    left.advance(left.matrix);
    left.logarithms();
  } else {
    left.logarithms();
    if (left.work.problem.end)
      for (int64_t j = 0; j < left.n; ++j) left.a[j] += static_cast<const C*>(left.work.problem.end)[j];
    left.offset += normalise(left.a, left.padded);
  }
  Vec<C> sum = {};
  for (int64_t j = 0; j < left.padded; j += Simd<C>::lanes) sum += exponential(load(left.a + j));
  return left.offset + std::log(static_cast<double>(sum_of(sum)));
}

template <class C, int BLOCK>
int64_t filter(const CrfWork& work, const CrfSequence& sequence, void* scratch) {
  const int64_t length = sequence.length;
  const int64_t middle = (length + 1) / 2;
  C* value = static_cast<C*>(work.value) + sequence.index;
  *value = 0;
  if (length == 0) return -1;
  Side<C, BLOCK> left(work, sequence, true, scratch);
  Side<C, BLOCK> right(work, sequence, false, scratch);
  double gold = 0;
  if (work.tags) {
    int64_t bad = -1;
    gold = gold_score<C>(work, sequence, &bad);
    if (bad >= 0) return bad;
  }
  left.filter_first(0);
  if (length > 1) right.filter_first(length - 1);
  for (int64_t k = 1; k < middle; ++k) {
    left.filter_step(k);
    if (k < length - middle) right.filter_step(length - 1 - k);
  }
  const double log_partition = join(left, right, length, middle) + (length > 1 ? right.offset : 0);
  if (!work.tags)
    *value = static_cast<C>(log_partition);
  else if (log_partition == -INFINITY)
    *value = -INFINITY;  // and not NaN where the gold path is forbidden as well
  else
    *value = static_cast<C>(gold - log_partition);
  return -1;
}

template <class C, int BLOCK>
void smooth(const CrfWork& work, const CrfSequence& sequence, void* scratch, const CrfSums& sums) {
  const CrfProblem& p = work.problem;
  const int64_t n = p.tags;
  const int64_t length = sequence.length;
  const int64_t middle = (length + 1) / 2;
  const int64_t bytes = n * (p.emissions_dtype == DType::f64 ? 8 : p.emissions_dtype == DType::f32 ? 4 : 2);
  char* const own = static_cast<char*>(work.demissions) + sequence.row0 * bytes;
  if (length < sequence.steps) std::memset(own, 0, static_cast<size_t>(sequence.steps * bytes));
  if (length == 0) return;

  Side<C, BLOCK> left(work, sequence, true, scratch);
  Side<C, BLOCK> right(work, sequence, false, scratch);
  const auto padded = left.padded;
  left.read(left.message(middle - 1));
  if (length > 1) right.read(right.message(middle));
  if (join(left, right, length, middle) == -INFINITY) {
    std::memset(own, 0, static_cast<size_t>(sequence.steps * bytes));
    return;
  }

  const double grad = static_cast<const C*>(work.grad)[sequence.index];
  const double sign = work.tags ? -grad : grad;  // of the marginals; the gold path counts +grad
  const auto tag_at = [&](int64_t k) {
    const int64_t tag = work.tags ? work.tags[left.row(k)] : -1;
    return tag < n ? tag : -1;
  };
  const auto write = [&](Side<C, BLOCK>& side, int64_t k) {  // demissions of step k from gamma
    const int64_t tag = tag_at(k);
    for (int64_t j = 0; j < padded; ++j) side.e[j] = static_cast<C>(sign) * side.gamma[j];
    if (tag >= 0) side.e[tag] += static_cast<C>(grad);
    store_emissions_grad(p, work.demissions, left.row(k), side.e);
    for (int boundary = 0; boundary < 2; ++boundary) {
      if (k != (boundary ? length - 1 : 0)) continue;
      double* to = boundary ? sums.end : sums.start;
      for (int64_t j = 0; j < n; ++j) to[j] += side.e[j];
    }
  };

  for (int64_t j = 0; j < padded; j += Simd<C>::lanes) store(left.gamma + j, exponential(load(left.a + j)));
  left.renormalise();
  left.clear_pairs();
  right.clear_pairs();
  if (length > 1) {
    std::memcpy(right.gamma, left.gamma, static_cast<size_t>(padded) * sizeof(C));
    write(right, middle);
    left.smooth_step(middle - 1, sign, sums);  // join() has entered the middle edge
  }
  write(left, middle - 1);
  for (int64_t d = 1; d < middle || middle + d < length; ++d) {
    if (d < middle) {
      left.enter(middle - d);
      left.smooth_step(middle - 1 - d, sign, sums);
      write(left, middle - 1 - d);
    }
    if (middle + d < length) {
      right.enter(middle + d);
      right.smooth_step(middle + d, sign, sums);
      write(right, middle + d);
    }
  }
  if (!p.transitions_per_position && length > 1) {
    left.flush(0, sign, sums);
    right.flush(0, sign, sums);
  }
  if (!work.tags || !work.transition_grad) return;
  if (!p.transitions_per_position) return add_gold_transitions(work, sequence, grad, sums);
  for (int64_t k = 1; k < length; ++k)
    if (tag_at(k - 1) >= 0 && tag_at(k) >= 0) left.add_transition(k - 1, tag_at(k - 1), tag_at(k), grad, sums);
}

template <class C, int BLOCK>
CrfKernels table() {
  CrfKernels kernels = decode_kernels<C, BLOCK>();
  kernels.matrices_size = [](const CrfProblem& p) -> size_t {
    return p.transitions_per_position ? 0 : 2 * Matrix<C>::elements(p.tags, padded_tags<C, BLOCK>(p.tags)) * sizeof(C);
  };
  kernels.prepare = [](const CrfWork& w) {
    if (w.problem.transitions_per_position || w.problem.batch == 0) return;
    const CrfSequence none = {};
    Side<C, BLOCK>(w, none, true, nullptr).prepare_edge(0);
    Side<C, BLOCK>(w, none, false, nullptr).prepare_edge(0);
  };
  kernels.chain_scratch = [](const CrfProblem& p) -> size_t { return 2 * Side<C, BLOCK>::elements(p) * sizeof(C); };
  kernels.filter = filter<C, BLOCK>;
  kernels.smooth = smooth<C, BLOCK>;
  if constexpr (sizeof(C) == sizeof(float)) lanes_kernels<BLOCK>(kernels);
  if constexpr (sizeof(C) == sizeof(float) && (BLOCK == 1 || BLOCK == 2)) lanes_viterbi_kernels<BLOCK>(kernels);
  return kernels;
}

// Tiles of 1, 2, 3, 4, 6 or 8 vectors: a row of up to 64 float32 tags is one tile and stays in registers.
template <class C>
CrfKernels table_for(int64_t tags) {
  const int64_t vectors = padded_tags<C, 1>(tags) / Simd<C>::lanes;
  if (vectors <= 1) return table<C, 1>();
  if (vectors <= 2) return table<C, 2>();
  if (vectors <= 3) return table<C, 3>();
  if (vectors <= 4) return table<C, 4>();
  if (vectors <= 6) return table<C, 6>();
  if (vectors <= 8) return table<C, 8>();
  return table<C, 0>();
}

}  // namespace

CrfKernels crf_kernels(const CrfProblem& problem) {
  return problem.emissions_dtype == DType::f64 ? table_for<double>(problem.tags) : table_for<float>(problem.tags);
}

}  // namespace FASTNLP_ISA
}  // namespace fastnlp
