// Vectors of 32 bytes in GCC's vector extension: one source, lowered to SSE2 pairs in the baseline build and to AVX2 in
// the x86-64-v3 build. Everything has internal linkage, so that the linker never mixes the two.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastnlp {
namespace {

template <class C>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = 8;
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
};

template <>
struct Simd<double> {
  static constexpr int lanes = 4;
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
};

template <class C>
using Vec = typename Simd<C>::V;
template <class C>
using Mask = typename Simd<C>::I;

#define FASTNLP_MEMBER inline __attribute__((always_inline))
#define FASTNLP_INLINE static FASTNLP_MEMBER

template <class C>
FASTNLP_INLINE Vec<C> load(const C* from) {
  Vec<C> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class C>
FASTNLP_INLINE void store(C* to, Vec<C> v) {
  std::memcpy(to, &v, sizeof v);
}
template <class C>
FASTNLP_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};
}

// v, of which the compiler knows nothing but that it stands in a register.
template <class V>
FASTNLP_INLINE V opaque(V v) {
#ifdef __AVX2__
  asm("" : "+x"(v));
#endif
  return v;
}

// v where the mask is set, else 0: also where v is inf or NaN, which times 0 is NaN.
FASTNLP_INLINE Simd<float>::V masked(Simd<float>::V v, Simd<float>::I mask) {
  return (Simd<float>::V)((Simd<float>::I)v & mask);
}
FASTNLP_INLINE Simd<double>::V masked(Simd<double>::V v, Simd<double>::I mask) {
  return (Simd<double>::V)((Simd<double>::I)v & mask);
}

// A NaN in a is passed over, a NaN in b is kept.
template <class V>
FASTNLP_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
// A NaN in a is passed over, a NaN in b is kept.
template <class V>
FASTNLP_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}
FASTNLP_INLINE bool any(Simd<float>::I mask) {
#ifdef __AVX2__
  return __builtin_ia32_movmskps256((Simd<float>::V)mask) != 0;
#else
  Simd<double>::I wide = (Simd<double>::I)mask;
  return (wide[0] | wide[1] | wide[2] | wide[3]) != 0;
#endif
}
FASTNLP_INLINE bool any(Simd<double>::I mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }

// Bit l is set where lane l of the mask is.
FASTNLP_INLINE unsigned bits_of(Simd<float>::I mask) {
#ifdef __AVX2__
  return static_cast<unsigned>(__builtin_ia32_movmskps256((Simd<float>::V)mask));
#else
  unsigned bits = 0;
  for (int l = 0; l < 8; ++l) bits |= (mask[l] != 0) << l;
  return bits;
#endif
}
FASTNLP_INLINE unsigned bits_of(Simd<double>::I mask) {
  unsigned bits = 0;
  for (int l = 0; l < 4; ++l) bits |= (mask[l] != 0) << l;
  return bits;
}

FASTNLP_INLINE float max_of(Simd<float>::V v) {
  typedef float H __attribute__((vector_size(16)));
  H lo = {v[0], v[1], v[2], v[3]};
  H hi = {v[4], v[5], v[6], v[7]};
  lo = lo > hi ? lo : hi;
  hi = H{lo[2], lo[3], lo[0], lo[1]};
  lo = lo > hi ? lo : hi;
  return lo[0] > lo[1] ? lo[0] : lo[1];
}
FASTNLP_INLINE double max_of(Simd<double>::V v) {
  const double a = v[0] > v[1] ? v[0] : v[1];
  const double b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
FASTNLP_INLINE float sum_of(Simd<float>::V v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}
FASTNLP_INLINE double sum_of(Simd<double>::V v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// exp for x <= 88: 0 below -87.3, NaN stays NaN. Degree 6 on |r| <= ln(2)/2; at most 1.01 ulp against float64, which
// tests/test_simd.py walks through.
FASTNLP_INLINE Simd<float>::V exponential(Simd<float>::V x) {
  using V = Simd<float>::V;
  typedef uint32_t U __attribute__((vector_size(32)));
  const V round = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const V shifted = x * splat(1.44269504088896341f) + round;
  const V n = shifted - round;
  V r = x - n * splat(0.693359375f);
  r = r + n * splat(2.12194440e-4f);
  V y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * (r * r) + r + splat(1.0f);
  const V power = (V)(((U)shifted << 23) + 0x3f800000u);  // 2^n; the product is exact, and NaN where y is
  return x < splat(-87.3f) ? V{} : y * power;
}

// log for normal positive x; NaN stays NaN, anything else gives a finite number that the caller does not use.
FASTNLP_INLINE Simd<float>::V logarithm(Simd<float>::V x) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  typedef uint32_t U __attribute__((vector_size(32)));  // wraps around
  const U bits = (U)x;
  const I e = (I)(bits - 0x3f3504f3u) >> 23;  // x = 2^e * m with m in [sqrt(1/2), sqrt(2))
  const V m = (V)(bits - ((U)e << 23)) - splat(1.0f);
  const V n = __builtin_convertvector(e, V);
  const V m2 = m * m;
  V y = splat(7.0376836292e-2f);
  y = y * m - splat(1.1514610310e-1f);
  y = y * m + splat(1.1676998740e-1f);
  y = y * m - splat(1.2420140846e-1f);
  y = y * m + splat(1.4249322787e-1f);
  y = y * m - splat(1.6668057665e-1f);
  y = y * m + splat(2.0000714765e-1f);
  y = y * m - splat(2.4999993993e-1f);
  y = y * m + splat(3.3333331174e-1f);
  y = y * m * m2;
  y = y - n * splat(2.12194440e-4f);
  y = y - splat(0.5f) * m2;
  const V result = m + y + n * splat(0.693359375f);
  return x == x ? result : x;
}

// float64 proves the float32 path and is not tuned.
FASTNLP_INLINE Simd<double>::V exponential(Simd<double>::V x) {
  return Simd<double>::V{std::exp(x[0]), std::exp(x[1]), std::exp(x[2]), std::exp(x[3])};
}
FASTNLP_INLINE Simd<double>::V logarithm(Simd<double>::V x) {
  return Simd<double>::V{std::log(x[0]), std::log(x[1]), std::log(x[2]), std::log(x[3])};
}

FASTNLP_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
FASTNLP_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// floor(log2 x) for normal x > 0, kept within +-126; and 2 to such a power.
FASTNLP_INLINE int exponent_of(float x) {
  const int e = static_cast<int>(to_bits(x) >> 23) - 127;
  return e > 126 ? 126 : e < -126 ? -126 : e;
}
FASTNLP_INLINE int exponent_of(double x) { return x > 1e38 ? 126 : x < 1e-37 ? -126 : std::ilogb(x); }
template <class C>
FASTNLP_INLINE C power_of_two(int exponent) {
  return from_bits(static_cast<uint32_t>(exponent + 127) << 23);
}

struct Half {
  uint16_t bits;
  operator float() const {
    const uint32_t exponent_mantissa = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const float scaled = from_bits(exponent_mantissa) * 5.192296858534828e33f;  // 2^112 moves the bias, subnormals too
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;      // inf and NaN
    return from_bits(to_bits(scaled) | special | static_cast<uint32_t>(bits & 0x8000) << 16);
  }
  static Half round(float x) {  // to nearest, ties to even
    const uint32_t sign = (to_bits(x) >> 16) & 0x8000;
    const uint32_t magnitude = to_bits(x) & 0x7fffffff;
    uint32_t h;
    if (magnitude > 0x7f800000) {
      h = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 rounds to infinity
      h = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: the addition of 0.5 rounds at 2^-24
      h = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
      h = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
    }
    return {static_cast<uint16_t>(h | sign)};
  }
};

struct BFloat16 {
  uint16_t bits;
  operator float() const { return from_bits(static_cast<uint32_t>(bits) << 16); }
  static BFloat16 round(float x) {
    if (x != x) return {0x7fc0};
    const uint32_t b = to_bits(x);
    return {static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16)};
  }
};

// The first n of the padded lanes of a row; the rest is `fill`.
template <class C>
FASTNLP_INLINE Mask<C> lanes_below(int64_t n) {
  if constexpr (sizeof(C) == 4) {
    const Mask<C> index = {0, 1, 2, 3, 4, 5, 6, 7};
    return index < (Mask<C>{} + static_cast<int32_t>(n));
  } else {
    const Mask<C> index = {0, 1, 2, 3};
    return index < (Mask<C>{} + n);
  }
}

FASTNLP_INLINE void load_row(const float* row, int64_t n, int64_t padded, float fill, float* to) {
#ifdef __AVX2__
  int64_t j = 0;  // whole vectors without a mask: AMD's masked loads that miss the cache wait for each other
  for (; j + 8 <= n; j += 8) store(to + j, load(row + j));
  for (; j < padded; j += 8) {
    const Simd<float>::I inside = lanes_below<float>(n - j);
    store(to + j, inside ? __builtin_ia32_maskloadps256((const Simd<float>::V*)(row + j), inside) : splat(fill));
  }
#else
  for (int64_t j = 0; j < n; ++j) to[j] = row[j];
  for (int64_t j = n; j < padded; ++j) to[j] = fill;
#endif
}
template <class S, class C>
FASTNLP_INLINE void load_row(const S* row, int64_t n, int64_t padded, C fill, C* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = row[j];
  for (int64_t j = n; j < padded; ++j) to[j] = fill;
}

// The last vector overlaps the one before it: AMD's masked stores take some 40 micro-operations each.
FASTNLP_INLINE void store_row(float* row, int64_t n, const float* from) {
  if (n < 8) {
    for (int64_t j = 0; j < n; ++j) row[j] = from[j];
    return;
  }
  for (int64_t j = 0; j + 8 <= n; j += 8) store(row + j, load(from + j));
  if (n % 8) store(row + n - 8, load(from + n - 8));
}
FASTNLP_INLINE void store_row(double* row, int64_t n, const double* from) {
  std::memcpy(row, from, static_cast<size_t>(n) * sizeof(double));
}

}  // namespace
}  // namespace fastnlp
