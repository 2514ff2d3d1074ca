// Rows of the four parameter types as vectors of the compute type C, and the rounding back. Internal linkage as in
// simd.h.
#pragma once
#include "../adafactor.h"
#include "simd.h"

namespace fastnlp {
namespace {

typedef uint16_t U16x8 __attribute__((vector_size(16)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr DType dtype = DType::f32;
};
template <>
struct TypeOf<double> {
  static constexpr DType dtype = DType::f64;
};
template <>
struct TypeOf<Half> {
  static constexpr DType dtype = DType::f16;
};
template <>
struct TypeOf<BFloat16> {
  static constexpr DType dtype = DType::bf16;
};

FASTNLP_INLINE Vec<float> widen(const float* from) { return load(from); }
FASTNLP_INLINE Vec<double> widen(const double* from) { return load(from); }
FASTNLP_INLINE Vec<float> widen(const BFloat16* from) {
  U16x8 half;
  std::memcpy(&half, from, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, U32x8) << 16);
}
FASTNLP_INLINE Vec<float> widen(const Half* from) {
#ifdef __F16C__
  typedef int16_t I16x8 __attribute__((vector_size(16)));
  I16x8 half;
  std::memcpy(&half, from, sizeof half);
  typedef short S16x8 __attribute__((vector_size(16)));
  return __builtin_ia32_vcvtph2ps256((S16x8)half);
#else
  return Vec<float>{from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
#endif
}

FASTNLP_INLINE void narrow(float* to, Vec<float> x) { store(to, x); }
FASTNLP_INLINE void narrow(double* to, Vec<double> x) { store(to, x); }
FASTNLP_INLINE void narrow(BFloat16* to, Vec<float> x) {
  const U32x8 bits = (U32x8)x;
  const U32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U16x8 half = __builtin_convertvector(x == x ? rounded : U32x8{} + 0x7fc0, U16x8);
  std::memcpy(to, &half, sizeof half);
}
FASTNLP_INLINE void narrow(Half* to, Vec<float> x) {
#ifdef __F16C__
  const auto half = __builtin_ia32_vcvtps2ph256(x, 0);  // to nearest
  std::memcpy(to, &half, sizeof half);
#else
  for (int l = 0; l < 8; ++l) to[l] = Half::round(x[l]);
#endif
}

// The last `count` elements of a row, fewer than a vector has; what lies behind them is 0.
template <class T>
FASTNLP_INLINE auto widen_tail(const T* from, int64_t count) {
  T padded[8] = {};
  for (int64_t j = 0; j < count; ++j) padded[j] = from[j];
  return widen(padded);
}
template <class T, class V>
FASTNLP_INLINE void narrow_tail(T* to, V x, int64_t count) {
  T padded[8];
  narrow(padded, x);
  for (int64_t j = 0; j < count; ++j) to[j] = padded[j];
}
#ifdef __AVX2__
// Convolutions have rows of 3 or 5: a vector loaded from where its elements were just stored one by one would wait.
FASTNLP_INLINE Vec<float> widen_tail(const float* from, int64_t count) {
  return __builtin_ia32_maskloadps256(reinterpret_cast<const Vec<float>*>(from), lanes_below<float>(count));
}
FASTNLP_INLINE void narrow_tail(float* to, Vec<float> x, int64_t count) {
  __builtin_ia32_maskstoreps256(reinterpret_cast<Vec<float>*>(to), lanes_below<float>(count), x);
}
#endif

// Random bits of the elements of a row: element j has number first + j * step.
struct Dither {
  uint64_t key;
  uint64_t step;
  uint64_t high = ~uint64_t{0};
  uint64_t mixed = 0;

  U32x8 bits(uint64_t first) {
    const uint64_t last = first + 7 * step;
    U32x8 low, k0, k1;
    for (uint32_t l = 0; l < 8; ++l) low[l] = static_cast<uint32_t>(first) + l * static_cast<uint32_t>(step);
    if (first >> 32 == last >> 32) {
      if (first >> 32 != high) high = first >> 32, mixed = adafactor_key_of(key, first);
      k0 = U32x8{} + static_cast<uint32_t>(mixed);
      k1 = U32x8{} + static_cast<uint32_t>(mixed >> 32);
    } else {
      for (uint32_t l = 0; l < 8; ++l) {
        const uint64_t k = adafactor_key_of(key, first + l * step);
        k0[l] = static_cast<uint32_t>(k);
        k1[l] = static_cast<uint32_t>(k >> 32);
      }
    }
    return mix(mix(low ^ k0) ^ k1);
  }

  static U32x8 mix(U32x8 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
  }
};

// x with its lower bits cut off or rounded up, up with the probability that its distance to the value below has: the
// result is a bfloat16 or a float16 exactly.
FASTNLP_INLINE Vec<float> dithered(const BFloat16*, Vec<float> x, U32x8 random) {
  const U32x8 bits = (U32x8)x;
  const auto special = (bits & 0x7f800000) == 0x7f800000;
  return special ? x : (Vec<float>)((bits + (random >> 16)) & 0xffff0000);
}
FASTNLP_INLINE Vec<float> dithered(const Half*, Vec<float> x, U32x8 random) {
  const U32x8 bits = (U32x8)x, magnitude = bits & 0x7fffffff;
  const Vec<float> normal = (Vec<float>)((bits + (random >> 19)) & 0xffffe000);
  // Below 2^-14 float16 has steps of 2^-24.
  const auto below = magnitude < 0x38800000;
  const Vec<float> steps = below ? (Vec<float>)magnitude * splat(16777216.0f) : Vec<float>{};
  const Vec<float> floor = __builtin_convertvector(__builtin_convertvector(steps, Simd<float>::I), Vec<float>);
  const Vec<float> chance = __builtin_convertvector((Simd<float>::I)(random >> 8), Vec<float>) * splat(5.9604645e-8f);
  const Vec<float> whole = floor + (steps - floor > chance ? splat(1.0f) : Vec<float>{});
  const Vec<float> small = (Vec<float>)((U32x8)(whole * splat(5.9604645e-8f)) | (bits & 0x80000000));
  const auto large = magnitude >= 0x477fe000;  // 65504, inf, NaN
  return large ? x : below ? small : normal;
}
FASTNLP_INLINE Vec<float> dithered(const float*, Vec<float> x, U32x8) { return x; }
FASTNLP_INLINE Vec<double> dithered(const double*, Vec<double> x, U32x8) { return x; }

template <class C, class T>
void convert_row(const T* from, int64_t stride, int64_t n, C* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<C>(from[j * stride]);
}
template <class T>
void gather_row(const T* from, int64_t stride, int64_t n, T* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = from[j * stride];
}
template <class T>
void scatter_row(T* to, int64_t stride, int64_t n, const T* from) {
  for (int64_t j = 0; j < n; ++j) to[j * stride] = from[j];
}

// A row of gradients whose type in memory is `dtype`, as adjacent elements of G: where it lies, or copied to `room`.
template <class G>
const G* adjacent_row(const void* data, DType dtype, int64_t at, int64_t stride, int64_t n, G* room) {
  if (dtype == TypeOf<G>::dtype) {
    const G* from = static_cast<const G*>(data) + at;
    if (stride == 1) return from;
    gather_row(from, stride, n, room);
  } else if constexpr (sizeof(G) >= 4) {
    if (dtype == DType::f32) convert_row(static_cast<const float*>(data) + at, stride, n, room);
    if (dtype == DType::f64) convert_row(static_cast<const double*>(data) + at, stride, n, room);
    if (dtype == DType::f16) convert_row(static_cast<const Half*>(data) + at, stride, n, room);
    if (dtype == DType::bf16) convert_row(static_cast<const BFloat16*>(data) + at, stride, n, room);
  }
  return room;
}

}  // namespace
}  // namespace fastnlp
