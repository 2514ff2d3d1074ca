// Products of small matrices: blocks of the result stay in registers, six rows of two vectors. Everything has internal
// linkage, like simd.h.
#pragma once
#include "simd.h"

namespace fastnlp {
namespace {

constexpr int64_t kGroup = 6;  // 12 sums, 2 vectors of b and 1 number of a: 15 of AVX2's 16 registers
template <class C>
constexpr int64_t kPanel = 2 * Simd<C>::lanes;

// to [ROWS, kPanel] = or += a [ROWS, depth] b [depth, kPanel]. Each sum is one chain of fused multiply-adds over the
// depth, from what `to` holds: however a long depth is cut into calls, the bits are the same.
template <class C, int ROWS, bool ADD>
__attribute__((noinline)) void block_product(int64_t depth, const C* a, int64_t a_row, int64_t a_step, const C* b,
                                             int64_t b_step, C* to, int64_t to_row) {
  constexpr int lanes = Simd<C>::lanes;
  Vec<C> sums[ROWS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 2; ++v) sums[r][v] = ADD ? load(to + r * to_row + v * lanes) : Vec<C>{};
  for (int64_t step = 0; step < depth; ++step) {
    const Vec<C> left = load(b);
    const Vec<C> right = load(b + lanes);
    for (int r = 0; r < ROWS; ++r) {
      const Vec<C> x = splat(a[r * a_row]);
      sums[r][0] += x * left;
      sums[r][1] += x * right;
    }
    a += a_step;
    b += b_step;
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 2; ++v) store(to + r * to_row + v * lanes, sums[r][v]);
}

// The same for 1 to kGroup rows.
template <class C, bool ADD>
void product(int64_t rows, int64_t depth, const C* a, int64_t a_row, int64_t a_step, const C* b, int64_t b_step, C* to,
             int64_t to_row) {
  switch (rows) {
    case 6: return block_product<C, 6, ADD>(depth, a, a_row, a_step, b, b_step, to, to_row);
    case 5: return block_product<C, 5, ADD>(depth, a, a_row, a_step, b, b_step, to, to_row);
    case 4: return block_product<C, 4, ADD>(depth, a, a_row, a_step, b, b_step, to, to_row);
    case 3: return block_product<C, 3, ADD>(depth, a, a_row, a_step, b, b_step, to, to_row);
    case 2: return block_product<C, 2, ADD>(depth, a, a_row, a_step, b, b_step, to, to_row);
    default: return block_product<C, 1, ADD>(depth, a, a_row, a_step, b, b_step, to, to_row);
  }
}

}  // namespace
}  // namespace fastnlp
