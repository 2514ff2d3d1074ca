// Eight sequences in the lanes of a vector: rows of memory to and from lanes, and products with a matrix they share.
#pragma once
#include "crf.h"
#include "simd.h"

namespace fastnlp {
namespace {

constexpr int kLanes = kSequenceLanes;
using Float8 = Vec<float>;
using Mask8 = Mask<float>;

template <int A, int B, int C, int D, int E, int F, int G, int H>
FASTNLP_INLINE Float8 shuffled(Float8 a, Float8 b) {
  return __builtin_shuffle(a, b, Mask8{A, B, C, D, E, F, G, H});
}
// rows[l][c] <-> rows[c][l]
FASTNLP_INLINE void transpose(Float8 (&rows)[kLanes]) {
  Float8 a[kLanes], b[kLanes];
  for (int i = 0; i < 8; i += 2) {
    a[i] = shuffled<0, 8, 1, 9, 4, 12, 5, 13>(rows[i], rows[i + 1]);
    a[i + 1] = shuffled<2, 10, 3, 11, 6, 14, 7, 15>(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = shuffled<0, 1, 8, 9, 4, 5, 12, 13>(a[i + h], a[i + 2 + h]);
      b[i + 2 * h + 1] = shuffled<2, 3, 10, 11, 6, 7, 14, 15>(a[i + h], a[i + 2 + h]);
    }
  for (int i = 0; i < 4; ++i) {
    rows[i] = shuffled<0, 1, 2, 3, 8, 9, 10, 11>(b[i], b[i + 4]);
    rows[i + 4] = shuffled<4, 5, 6, 7, 12, 13, 14, 15>(b[i], b[i + 4]);
  }
}

// One address for each lane, as integers, so that all of them move at once.
struct Rows {
  alignas(32) int64_t at[kLanes];
  template <class E>
  E* row(int l) const {
    return reinterpret_cast<E*>(at[l]);
  }
};

// An array of rows, of which each lane walks through its own.
struct Strip {
  Rows zero;     // where row 0 would be
  Rows ends[2];  // the outermost step of a half and the one at the middle, where the mask has no holes
  int64_t bytes;
};

// to[c] <- lane l holds rows[l][c]. The last eight columns overlap those before them; up to three are taken singly.
FASTNLP_INLINE void gather(const Rows& rows, int64_t n, float* to) {
  const auto block = [&](int64_t c) {
    Float8 v[kLanes];
    for (int l = 0; l < kLanes; ++l) v[l] = load(rows.row<const float>(l) + c);
    transpose(v);
    for (int l = 0; l < kLanes; ++l) store(to + (c + l) * kLanes, v[l]);
  };
  int64_t c = 0;
  for (; c + 8 <= n; c += 8) block(c);
  if (n - c > 3 && n > 8) return block(n - 8);
  for (; c < n; ++c) {
    Float8 v;
    for (int l = 0; l < kLanes; ++l) v[l] = rows.row<const float>(l)[c];
    store(to + c * kLanes, v);
  }
}
// The other way round, for the first `count` lanes.
FASTNLP_INLINE void scatter(const float* from, int64_t n, int count, const Rows& rows) {
  const auto block = [&](int64_t c) {
    Float8 v[kLanes];
    for (int l = 0; l < kLanes; ++l) v[l] = load(from + (c + l) * kLanes);
    transpose(v);
    if (count == kLanes)
      for (int l = 0; l < kLanes; ++l) store(rows.row<float>(l) + c, v[l]);
    else
      for (int l = 0; l < count; ++l) store(rows.row<float>(l) + c, v[l]);
  };
  int64_t c = 0;
  for (; c + 8 <= n; c += 8) block(c);
  if (n - c > 3 && n > 8) return block(n - 8);
  for (; c < n; ++c) {
    const float* const v = from + c * kLanes;
    if (count == kLanes)
      for (int l = 0; l < kLanes; ++l) rows.row<float>(l)[c] = v[l];
    else
      for (int l = 0; l < count; ++l) rows.row<float>(l)[c] = v[l];
  }
}

// to_j = sum_i p_i M_ij, up to eight j at a time, as many sums as hide the latency of a multiply-add. Each element of
// a small matrix stands eight times in a row (SPREAD), which saves the instruction that would spread it.
template <int J, bool SPREAD>
FASTNLP_INLINE void dot_columns(const float* p, const float* matrix, int64_t n, int64_t stride, float* to) {
  Float8 sums[J] = {};
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) {
    const Float8 pi = load(p + i * kLanes);
    for (int j = 0; j < J; ++j)
      sums[j] += pi * (SPREAD ? load(matrix + i * stride + j * kLanes) : splat(matrix[i * stride + j]));
  }
  for (int j = 0; j < J; ++j) store(to + j * kLanes, sums[j]);
}
template <bool SPREAD>
FASTNLP_INLINE void dot_lanes(const float* p, const float* matrix, int64_t n, int64_t stride, float* to) {
  for (int64_t j = 0, width; j < n; j += width) {
    width = n - j > 16 || n - j <= 8 ? 8 : (n - j + 1) / 2;  // two of equal width rather than 8 and a rest
    width = n - j < width ? n - j : width;
    const float* m = matrix + j * (SPREAD ? kLanes : 1);
    float* t = to + j * kLanes;
    switch (width) {
      case 8: dot_columns<8, SPREAD>(p, m, n, stride, t); break;
      case 7: dot_columns<7, SPREAD>(p, m, n, stride, t); break;
      case 6: dot_columns<6, SPREAD>(p, m, n, stride, t); break;
      case 5: dot_columns<5, SPREAD>(p, m, n, stride, t); break;
      case 4: dot_columns<4, SPREAD>(p, m, n, stride, t); break;
      case 3: dot_columns<3, SPREAD>(p, m, n, stride, t); break;
      case 2: dot_columns<2, SPREAD>(p, m, n, stride, t); break;
      default: dot_columns<1, SPREAD>(p, m, n, stride, t); break;
    }
  }
}

// to <- [N, N, 8], each element eight times; returns it.
FASTNLP_INLINE const float* spread_matrix(const float* from, int64_t n, int64_t row, int64_t column, float* to) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) store(to + (i * n + j) * kLanes, splat(from[i * row + j * column]));
  return to;
}

}  // namespace
}  // namespace fastnlp
