// Kernels that return paths or walk one way only: Viterbi, n-best, sampling, entropy. Included by crf.cpp.
#pragma once
#include <optional>

#include "crf_chain.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

// Scratch: rows of [length, P] scores, then what a step needs. Matrices per position are prepared behind it.
template <class C, int BLOCK>
struct Walk {
  const CrfWork& work;
  const CrfProblem& problem;
  const CrfSequence& sequence;
  const int64_t n;
  const Padded<C, BLOCK> padded;
  Matrix<C> forward;   // T
  Matrix<C> backward;  // T transposed
  C* memory;

  static int64_t elements(const CrfProblem& p) {
    return p.transitions_per_position ? 2 * Matrix<C>::elements(p.tags, padded_tags<C, BLOCK>(p.tags)) : 0;
  }

  Walk(const CrfWork& w, const CrfSequence& s, void* scratch)
      : work(w), problem(w.problem), sequence(s), n(w.problem.tags), padded{padded_tags<C, BLOCK>(n)} {
    const int64_t size = Matrix<C>::elements(n, padded);
    C* matrices = static_cast<C*>(problem.transitions_per_position ? scratch : w.matrices);
    forward = Matrix<C>(matrices, n, padded);
    backward = Matrix<C>(matrices + size, n, padded);
    memory = static_cast<C*>(scratch) + elements(problem);
  }

  void enter(int64_t k, bool forth, bool back) {
    if (!problem.transitions_per_position) return;
    const C* transitions = static_cast<const C*>(problem.transitions) +
                           sequence.index * problem.transitions_batch_stride +
                           (sequence.position(k) - 1) * problem.transitions_step_stride;
    const int64_t from = problem.transitions_from_stride, to = problem.transitions_to_stride;
    if (forth) forward.prepare(transitions, from, to, n, padded);
    if (back) backward.prepare(transitions, to, from, n, padded);
  }

  int64_t row(int64_t k) const { return sequence.row0 + sequence.position(k); }
  int64_t emission_offset(int64_t k) const {
    const int64_t step = problem.cu_seqlens ? row(k) : sequence.position(k);
    return sequence.index * problem.emissions_batch_stride + step * problem.emissions_step_stride;
  }
  void read_emissions(int64_t k, C* to) const { load_emissions(problem, emission_offset(k), padded, to); }
  C emission(int64_t k, int64_t tag) const { return load_emission<C>(problem, emission_offset(k) + tag); }
  C start(int64_t j) const { return problem.start ? static_cast<const C*>(problem.start)[j] : 0; }
  C end(int64_t j) const { return problem.end ? static_cast<const C*>(problem.end)[j] : 0; }
  // The forward message of valid step k, from that of k - 1.
  void filter(Chain<C, BLOCK>& chain, int64_t k) {
    if (k > 0) {
      enter(k, true, false);
      read_emissions(k, chain.e);
      chain.advance(forward);
      return chain.logarithms();
    }
    read_emissions(0, chain.a);
    for (int64_t j = 0; j < n; ++j) chain.a[j] += start(j);
    chain.begin();
  }
  void no_path(int64_t* path) const {
    for (int64_t t = 0; t < sequence.steps; ++t) path[sequence.row0 + t] = -1;
  }
};

// The lowest index with the highest value; 0 where all are NaN. The padding is -inf.
template <class C, class P>
FASTNLP_INLINE int64_t first_max(const C* x, int64_t n, P padded) {
  constexpr int lanes = Simd<C>::lanes;
  Vec<C> top = splat(-static_cast<C>(INFINITY));
  for (int64_t i = 0; i < padded; i += lanes) top = maximum(load(x + i), top);
  const Vec<C> best = splat(max_of(top));
  for (int64_t i = 0; i < padded; i += 64) {  // a branch for each vector would seldom be foreseen
    uint64_t found = 0;
    for (int64_t c = 0; c < 64 && i + c < padded; c += lanes)
      found |= static_cast<uint64_t>(bits_of(load(x + i + c) == best)) << c;
    if (found == 0) continue;
    const int64_t first = i + __builtin_ctzll(found);
    return first < n ? first : 0;
  }
  return 0;
}

// Forward keeps scores only (an addition and a maximum for each pair); the arg max is taken again along the best path,
// N operations a step. Rounding is monotone, so max_i(fl(a_i + T_ij)) + e_j equals max_i(fl(fl(a_i + T_ij) + e_j)): the
// scores are those of torchcrf to the bit, and so are ties, which are compared with e_j added.
template <class C, int BLOCK>
struct Viterbi : Walk<C, BLOCK> {
  using Base = Walk<C, BLOCK>;
  static constexpr int lanes = Simd<C>::lanes;
  static constexpr int T = tile<BLOCK>;
  C* a;  // [length, P]
  C* e;
  int64_t tag = 0;

  Viterbi(const CrfWork& work, const CrfSequence& sequence, void* scratch) : Base(work, sequence, scratch) {
    a = this->memory;
    e = a + sequence.length * this->padded;
    if (sequence.length < sequence.steps) this->no_path(work.paths);
    if (sequence.length == 0) {
      static_cast<C*>(work.scores)[sequence.index] = 0;
      return;
    }
    this->read_emissions(0, a);
    for (int64_t j = 0; j < this->n; ++j) a[j] = this->start(j) + a[j];
  }
  void* behind() const { return e + this->padded; }

  // Step k of S sequences, which share the matrix and its loads where they are two.
  template <int S>
  static void forward_step(Viterbi* const (&each)[S], int64_t k) {
    constexpr int width = S == 1 || T <= 4 ? T : T / 2;  // as many maxima as stay in registers
    constexpr int unroll = S * width <= 2 ? 4 : S * width <= 4 ? 2 : 1;
    const int64_t n = each[0]->n;
    const auto padded = each[0]->padded;
    const C* from[S];
    C* to[S];
    for (int s = 0; s < S; ++s) {
      from[s] = each[s]->a + (k - 1) * padded;
      to[s] = each[s]->a + k * padded;
      each[s]->enter(k, true, false);
      each[s]->read_emissions(k, each[s]->e);
    }
    for (int64_t block = 0; block < padded; block += width * lanes) {
      Vec<C> best[S][unroll][width];
      for (int s = 0; s < S; ++s)
        for (int u = 0; u < unroll; ++u)
          for (int v = 0; v < width; ++v) best[s][u][v] = splat(-static_cast<C>(INFINITY));
      const C* scores = each[0]->forward.scores + block;
      // a * 1 + T is a + T to the bit, and leaves the pipes of additions, which AMD shares with maxima, to the maxima.
      const Vec<C> one = opaque(splat(C(1)));
      const auto enter_from = [&](int64_t i, int u) {
        for (int v = 0; v < width; ++v) {
          const Vec<C> score = opaque(load(scores + i * padded + v * lanes));
          for (int s = 0; s < S; ++s) best[s][u][v] = maximum(splat(from[s][i]) * one + score, best[s][u][v]);
        }
      };
      int64_t i = 0;
      for (; i + unroll <= n; i += unroll)
        for (int u = 0; u < unroll; ++u) enter_from(i + u, u);
      for (; i < n; ++i) enter_from(i, 0);
      for (int s = 0; s < S; ++s)
        for (int v = 0; v < width; ++v) {
          for (int u = 1; u < unroll; ++u) best[s][0][v] = maximum(best[s][u][v], best[s][0][v]);
          store(to[s] + block + v * lanes, best[s][0][v] + load(each[s]->e + block + v * lanes));
        }
    }
  }
  void turn() {
    C* last = a + (this->sequence.length - 1) * this->padded;
    for (int64_t j = 0; j < this->n; ++j) last[j] += this->end(j);
    tag = first_max(last, this->n, this->padded);
    static_cast<C*>(this->work.scores)[this->sequence.index] = last[tag];
    this->work.paths[this->row(this->sequence.length - 1)] = tag;
  }
  void back_step(int64_t k) {
    const auto padded = this->padded;
    this->enter(k, false, true);
    const C* from = a + (k - 1) * padded;
    const C* column = this->backward.scores + tag * padded;
    const Vec<C> emission = splat(this->emission(k, tag));
    for (int64_t i = 0; i < padded; i += lanes) store(e + i, (load(from + i) + load(column + i)) + emission);
    tag = first_max(e, this->n, padded);
    this->work.paths[this->row(k - 1)] = tag;
  }
};

// Up to kPathGroup sequences, longest first: forwards two share each step, and backwards all take turns, because a step
// waits for the one before it and the others fill the wait.
template <class C, int BLOCK>
void viterbi(const CrfWork& work, const CrfSequence* sequences, int64_t count, void* scratch) {
  std::optional<Viterbi<C, BLOCK>> walks[kPathGroup];
  int64_t lengths[kPathGroup + 1] = {};
  for (int64_t l = 0; l < count; ++l) {
    walks[l].emplace(work, sequences[l], scratch);
    lengths[l] = sequences[l].length;
    scratch = walks[l]->behind();
  }
  for (int64_t l = 0; l < count; l += 2) {
    const int64_t shared = work.problem.transitions_per_position ? 0 : lengths[l + 1];
    int64_t k = 1;
    for (; k < shared; ++k) Viterbi<C, BLOCK>::template forward_step<2>({&*walks[l], &*walks[l + 1]}, k);
    for (; k < lengths[l]; ++k) {
      Viterbi<C, BLOCK>::template forward_step<1>({&*walks[l]}, k);
      if (k < lengths[l + 1]) Viterbi<C, BLOCK>::template forward_step<1>({&*walks[l + 1]}, k);
    }
  }
  for (int64_t l = 0; l < count && lengths[l] > 0; ++l) walks[l]->turn();
  for (int64_t k = lengths[0] - 1; k > 0; --k)
    for (int64_t l = 0; l < count && k < lengths[l]; ++l) walks[l]->back_step(k);
}

// K best lists per tag; a candidate enters only where it is strictly better, so ties keep the lowest (tag, rank).
template <class C, int BLOCK>
void viterbi_n_best(const CrfWork& work, const CrfSequence& sequence, void* scratch) {
  Walk<C, BLOCK> walk(work, sequence, scratch);
  const int64_t n = walk.n, length = sequence.length, best = work.n_best;
  const C infinity = INFINITY;
  C* scores = static_cast<C*>(work.scores) + sequence.index * best;
  for (int64_t r = 0; r < best; ++r) {
    scores[r] = length == 0 && r == 0 ? 0 : -infinity;
    const int64_t rows = work.problem.cu_seqlens ? work.rows : sequence.steps;
    const int64_t base = work.problem.cu_seqlens ? sequence.row0 : sequence.row0 * best;
    for (int64_t t = 0; t < sequence.steps; ++t) work.paths[base + r * rows + t] = -1;
  }
  if (length == 0) return;
  const int64_t width = n * best;
  int64_t* origins = reinterpret_cast<int64_t*>(walk.memory);   // [length + 1, N, K], -1: no such path
  C* a = reinterpret_cast<C*>(origins + (length + 1) * width);  // [2, N, K]
  C* e = a + 2 * width;                                         // [P]
  const auto insert = [&](C score, int64_t origin, C* to, int64_t* to_origin) {
    int64_t r = best;
    while (r > 0 && (to_origin[r - 1] < 0 || score > to[r - 1])) --r;
    if (r == best) return;
    for (int64_t q = best - 1; q > r; --q) {
      to[q] = to[q - 1];
      to_origin[q] = to_origin[q - 1];
    }
    to[r] = score;
    to_origin[r] = origin;
  };
  walk.read_emissions(0, e);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t r = 0; r < best; ++r) {
      a[j * best + r] = r == 0 ? walk.start(j) + e[j] : -infinity;
      origins[j * best + r] = r == 0 ? 0 : -1;
    }
  for (int64_t k = 1; k <= length; ++k) {  // the step at `length` collects the ends
    const C* before = a + ((k - 1) & 1) * width;
    const int64_t* before_origin = origins + (k - 1) * width;
    C* to = a + (k & 1) * width;
    int64_t* to_origin = origins + k * width;
    const bool last = k == length;
    if (!last) {
      walk.enter(k, true, false);
      walk.read_emissions(k, e);
    }
    for (int64_t j = 0; j < (last ? 1 : n); ++j) {
      for (int64_t r = 0; r < best; ++r) to_origin[j * best + r] = -1;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < best && before_origin[i * best + r] >= 0; ++r) {
          const C x = before[i * best + r];
          const C score = last ? x + walk.end(i) : (x + walk.forward.scores[i * walk.padded + j]) + e[j];
          insert(score, i * best + r, to + j * best, to_origin + j * best);
        }
    }
  }
  const int64_t* ends = origins + length * width;
  for (int64_t r = 0; r < best && ends[r] >= 0; ++r) {
    scores[r] = (a + (length & 1) * width)[r];
    if (r > 0 && scores[r] == -infinity) break;  // a forbidden path is no runner-up
    int64_t cell = ends[r];
    for (int64_t k = length - 1; k >= 0; --k) {
      const int64_t at = work.problem.cu_seqlens ? r * work.rows + walk.row(k)
                                                 : (sequence.row0 * best + r * sequence.steps) + sequence.position(k);
      work.paths[at] = cell / best;
      cell = origins[k * width + cell];
    }
  }
}

// Forward filtering, then tags drawn backwards from P(i | j) = softmax_i(a_i + T_ij) by inverse CDF in index order.
template <class C, int BLOCK>
void sample(const CrfWork& work, const CrfSequence& sequence, void* scratch) {
  constexpr int lanes = Simd<C>::lanes;
  Walk<C, BLOCK> walk(work, sequence, scratch);
  const int64_t n = walk.n, length = sequence.length;
  const auto padded = walk.padded;
  for (int64_t s = 0; s < work.samples; ++s)
    if (length < sequence.steps) walk.no_path(work.paths + s * work.rows);
  if (length == 0) return;
  C* messages = walk.memory;  // [length, P]
  Chain<C, BLOCK> chain;
  C* p = chain.place(messages + length * padded, n);
  for (int64_t k = 0; k < length; ++k) {
    walk.filter(chain, k);
    std::memcpy(messages + k * padded, chain.a, static_cast<size_t>(padded) * sizeof(C));
  }
  C* const e = chain.e;
  const auto draw = [&](float uniform) {  // from exp(e - max e)
    normalise(e, padded);
    C total = 0;
    for (int64_t i = 0; i < padded; i += lanes) store(p + i, exponential(load(e + i)));
    for (int64_t i = 0; i < n; ++i) p[i] = total += p[i];
    const C target = static_cast<C>(uniform) * total;
    int64_t i = 0;
    while (i + 1 < n && !(p[i] > target)) ++i;
    while (i > 0 && p[i] == p[i - 1]) --i;  // rounding at the top end must not pick a tag of probability 0
    return i;
  };
  for (int64_t s = 0; s < work.samples; ++s) {
    const float* uniforms = work.uniforms + s * work.rows;
    int64_t* path = work.paths + s * work.rows;
    int64_t tag = 0;
    for (int64_t k = length - 1; k >= 0; --k) {
      const C* from = messages + k * padded;
      if (k == length - 1) {
        for (int64_t i = 0; i < padded; ++i) e[i] = i < n ? from[i] + walk.end(i) : from[i];
      } else {
        walk.enter(k + 1, false, true);
        const C* column = walk.backward.scores + tag * padded;
        for (int64_t i = 0; i < padded; i += lanes) store(e + i, load(from + i) + load(column + i));
      }
      tag = draw(uniforms[walk.row(k)]);
      path[walk.row(k)] = tag;
    }
  }
}

// H_k(j) = sum_i P(i|j) (H_{k-1}(i) - log P(i|j)): the entropy of the steps before k, given tag j at step k.
template <class C, int BLOCK>
void entropy(const CrfWork& work, const CrfSequence& sequence, void* scratch) {
  Walk<C, BLOCK> walk(work, sequence, scratch);
  const int64_t n = walk.n, length = sequence.length;
  const auto padded = walk.padded;
  C* value = static_cast<C*>(work.value) + sequence.index;
  *value = 0;
  if (length == 0) return;
  Chain<C, BLOCK> chain;
  C* h = chain.place(walk.memory, n);
  C* h_before = h + padded;
  const auto conditional = [&](const auto& log_weight) {  // sum_i P_i (h_before_i - log P_i), P = softmax(log_weight)
    C top = -INFINITY;
    for (int64_t i = 0; i < n; ++i) top = log_weight(i) > top ? log_weight(i) : top;
    if (top == -static_cast<C>(INFINITY)) return static_cast<C>(0);
    C total = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const C x = log_weight(i) - top, weight = std::exp(x);
      total += weight;
      if (!(weight == 0)) sum += weight * (h_before[i] - x);
    }
    return sum / total + std::log(total);
  };
  walk.filter(chain, 0);
  for (int64_t j = 0; j < n; ++j) h[j] = 0;
  for (int64_t k = 1; k < length; ++k) {
    for (int64_t j = 0; j < n; ++j) h_before[j] = h[j];
    walk.enter(k, true, false);
    for (int64_t j = 0; j < n; ++j)
      h[j] = conditional([&](int64_t i) { return chain.a[i] + walk.forward.scores[i * padded + j]; });
    walk.filter(chain, k);
  }
  for (int64_t j = 0; j < n; ++j) h_before[j] = h[j];
  *value = conditional([&](int64_t i) { return chain.a[i] + walk.end(i); });
}

template <class C, int BLOCK>
CrfKernels decode_kernels() {
  CrfKernels kernels = {};
  kernels.path_scratch = [](const CrfWork& w, int64_t longest) -> size_t {
    const int64_t padded = padded_tags<C, BLOCK>(w.problem.tags);
    const int64_t walk = Walk<C, BLOCK>::elements(w.problem);
    const int64_t rows = (longest + Chain<C, BLOCK>::rows + 2) * padded;
    return static_cast<size_t>(walk + rows + 8) * sizeof(C);
  };
  kernels.n_best_scratch = [](const CrfWork& w, int64_t longest) -> size_t {
    const int64_t padded = padded_tags<C, BLOCK>(w.problem.tags), lists = w.problem.tags * w.n_best;
    const int64_t numbers = Walk<C, BLOCK>::elements(w.problem) + 2 * lists + padded + 8;
    return static_cast<size_t>(numbers) * sizeof(C) + static_cast<size_t>((longest + 1) * lists) * sizeof(int64_t);
  };
  kernels.viterbi = viterbi<C, BLOCK>;
  kernels.viterbi_n_best = viterbi_n_best<C, BLOCK>;
  kernels.sample = sample<C, BLOCK>;
  kernels.entropy = entropy<C, BLOCK>;
  return kernels;
}

}  // namespace
}  // namespace FASTNLP_ISA
}  // namespace fastnlp
