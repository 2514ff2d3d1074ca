// Eight sequences at once, one in each lane of a vector: no lane is padding, no maximum or sum crosses lanes, and every
// exponential serves eight steps. At 9 tags that is a fifth of the instructions of one sequence at a time.
//
// These kernels know the ordinary case alone: one matrix for all positions, and numbers that stay in range. A lane
// where something rare happens fails, and the caller gives its sequence to the kernels of crf.cpp, whose messages have
// the same form. The mathematics is theirs, with gamma kept as p r,
//     r_{k-1}(i) = sum_j E_ij w_j / c,    w_j = exp(e_k(j) + top_j - d) r_k(j),    c such that sum_i p_i r_i = 1,
// so that a step backwards takes one product with E where the posterior kernel takes two. It stays in range: w_j / c is
// gamma_j / s_j, and s_j was above the guard.
#pragma once
#include "crf_gold.h"
#include "crf_lane_side.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

// Both halves of up to eight sequences, longest first, and the edge between them.
template <bool SPREAD>
struct Lanes {
  const CrfWork& work;
  const CrfSequence* const sequences;
  const int64_t n;
  const int64_t padded;
  const int all;
  const int count;  // sequences of two steps and more; the others fail
  Matrix<float> forward, backward;
  LaneSide<SPREAD> left, right;
  Float8 partition;  // Z exp(-(left.shift + right.shift) - highest)
  float highest = -INFINITY;

  static size_t bytes(const CrfProblem& problem) {
    return static_cast<size_t>(2 * LaneSide<SPREAD>::elements(problem.tags)) * sizeof(float);
  }

  Lanes(const CrfWork& w, const CrfSequence* s, int64_t given, int64_t padded, void* scratch)
      : work(w),
        sequences(s),
        n(w.problem.tags),
        padded(padded),
        all(static_cast<int>(given)),
        count(with_two_steps(s, all)),
        forward(static_cast<float*>(w.matrices), n, padded),
        backward(static_cast<float*>(w.matrices) + Matrix<float>::elements(n, padded), n, padded),
        left(w, s, count, Part::left, forward, padded, static_cast<float*>(scratch)),
        right(w, s, count, Part::right, backward, padded,
              static_cast<float*>(scratch) + LaneSide<SPREAD>::elements(n)) {
    for (int64_t j = 0; j < n; ++j) highest = forward.top[j] > highest ? forward.top[j] : highest;
  }
  static int with_two_steps(const CrfSequence* s, int given) {
    int lanes = 0;
    while (lanes < given && s[lanes].length > 1) ++lanes;
    return lanes;
  }

  // right.r <- the joint of the middle edge without q_j, left.x <- w_j of this edge, both up to 1 / Z.
  void join() {
    dot_lanes<SPREAD>(left.p, left.products, n, left.stride, right.r);
    partition = Float8{};
    for (int64_t j = 0; j < n; ++j) {
      const Float8 factor = exponential(splat(forward.top[j] - highest));
      const Float8 f = load(right.r + j * kLanes) * factor, q = load(right.p + j * kLanes);
      store(right.r + j * kLanes, f);
      store(left.x + j * kLanes, q * factor);
      store(left.r + j * kLanes, splat(1.0f));
      partition += f * q;
    }
    left.failed |= ~(partition > splat(static_cast<float>(kGuard))) & lanes_below<float>(count);
  }
  unsigned failed() const {
    const unsigned missing = ((1u << all) - 1) & ~((1u << count) - 1);
    return missing | bits_of((left.failed | right.failed) & lanes_below<float>(count));
  }

  unsigned filter() {
    if (count == 0) return failed();
    left.filter_first();
    right.filter_first();
    for (int64_t first = 1; first < left.lengths[0]; first += kBlock) {
      left.weigh_block(first, false);
      right.weigh_block(first, false);
      for (int slot = 0; slot < kBlock && first + slot < left.lengths[0]; ++slot) {
        left.filter_step(slot, first + slot);
        if (first + slot < right.lengths[0]) right.filter_step(slot, first + slot);
      }
      if (failed() == (1u << all) - 1) return failed();
    }
    join();
    unsigned lost = failed();
    for (int l = 0; l < count; ++l) {
      if (lost >> l & 1) continue;
      const double log_partition =
          left.shift[l] + right.shift[l] + highest + std::log(static_cast<double>(partition[l]));
      int64_t bad = -1;
      const double gold = work.tags ? gold_score<float>(work, sequences[l], &bad) : 0;
      if (bad >= 0) lost |= 1u << l;
      static_cast<float*>(work.value)[sequences[l].index] =
          static_cast<float>(work.tags ? gold - log_partition : log_partition);
    }
    return lost;
  }

  unsigned smooth(const CrfSums& sums) {
    if (count == 0) return failed();
    float grad[kLanes] = {};
    const int64_t size = work.problem.emissions_dtype == DType::f32 ? 4 : 2;
    for (int l = 0; l < count; ++l) {
      const CrfSequence& s = sequences[l];
      grad[l] = static_cast<const float*>(work.grad)[s.index];
      if (s.length < s.steps)
        std::memset(static_cast<char*>(work.demissions) + s.row0 * n * size, 0,
                    static_cast<size_t>(s.steps * n * size));
    }
    const Float8 sign = work.tags ? -load(grad) : load(grad);
    left.read_message(0, count, left.p);
    right.read_message(0, count, right.p);
    join();
    left.scale = right.scale = splat(1.0f) / partition;
    right.write_gradients(0, count, right.p, sign, grad);
    left.smooth_step(0, 0, sign, grad);
    for (int64_t first = 1; first < left.lengths[0]; first += kBlock) {
      left.weigh_block(first - 1, true);
      right.weigh_block(first - 1, true);
      for (int slot = 0; slot < kBlock && first + slot < left.lengths[0]; ++slot) {
        left.smooth_step(slot, first + slot, sign, grad);
        if (first + slot < right.lengths[0]) right.smooth_step(slot, first + slot, sign, grad);
      }
    }
    const unsigned lost = failed();
    const Mask8 usable = ~(left.failed | right.failed) & lanes_below<float>(count);
    if (work.transition_grad) {
      left.add_pending();
      right.add_pending();
    }
    left.add_sums(sign, usable, padded, sums);
    right.add_sums(sign, usable, padded, sums);
    for (int l = 0; l < count && work.tags && work.transition_grad; ++l)
      if (!(lost >> l & 1)) add_gold_transitions(work, sequences[l], grad[l], sums);
    return lost;
  }
};

template <int BLOCK>
void lanes_kernels(CrfKernels& kernels) {
  using Kernel = Lanes<(BLOCK > 0 && BLOCK <= 2)>;
  constexpr auto width = padded_tags<float, BLOCK>;
  kernels.lanes_scratch = Kernel::bytes;
  kernels.filter_lanes = [](const CrfWork& w, const CrfSequence* s, int64_t count, void* scratch) {
    return Kernel(w, s, count, width(w.problem.tags), scratch).filter();
  };
  kernels.smooth_lanes = [](const CrfWork& w, const CrfSequence* s, int64_t count, void* scratch, const CrfSums& sums) {
    return Kernel(w, s, count, width(w.problem.tags), scratch).smooth(sums);
  };
}

}  // namespace
}  // namespace FASTNLP_ISA
}  // namespace fastnlp
