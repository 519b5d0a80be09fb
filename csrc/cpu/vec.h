// Vectors of BAM_BYTES bytes, by the compiler's own vector types: one source for every instruction
// set. Only what those types cannot say (masks, half precision, a fast reciprocal) is spelt out.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "types.h"

#define BAM_INLINE inline __attribute__((always_inline))

namespace bam {
namespace BAM_ISA {

template <class A>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float vec __attribute__((vector_size(BAM_BYTES)));
  typedef int32_t ints __attribute__((vector_size(BAM_BYTES)));
  typedef uint32_t uints __attribute__((vector_size(BAM_BYTES)));
  using uint = uint32_t;
};
template <>
struct VecTypes<double> {
  typedef double vec __attribute__((vector_size(BAM_BYTES)));
  typedef int64_t ints __attribute__((vector_size(BAM_BYTES)));
  typedef uint64_t uints __attribute__((vector_size(BAM_BYTES)));
  using uint = uint64_t;
};

template <class A>
using Vec = typename VecTypes<A>::vec;
template <class A>
using Uints = typename VecTypes<A>::uints;
template <class A>
constexpr int kLanes = BAM_BYTES / int(sizeof(A));

// The accumulator of a storage type: float for the half types.
template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class A>
BAM_INLINE Vec<A> splat(A a) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm512_set1_ps(a);
  else return (Vec<A>)_mm512_set1_pd(a);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm256_set1_ps(a);
  else return (Vec<A>)_mm256_set1_pd(a);
#else
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = a;
  return v;
#endif
}

template <class A>
BAM_INLINE Vec<A> zero() {
  return Vec<A>{};
}

// --- load and store, with conversion ----------------------------------------------------------

typedef uint16_t Halves __attribute__((vector_size(BAM_BYTES / 2)));

BAM_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
BAM_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
BAM_INLINE Vec<float> widen(Halves h, bf16) {
  return (Vec<float>)(__builtin_convertvector(h, Uints<float>) << 16);
}
BAM_INLINE Halves narrow(Vec<float> v, bf16) {
  Uints<float> u = (Uints<float>)v;
  Uints<float> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  Uints<float> quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((v == v) ? rounded : quiet, Halves);
}

// Half precision where the processor cannot convert it, one value at a time.
inline float f16_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float tiny = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_f16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7c00u);  // 65536 and more
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns 2^-24 with the last bit of a float
    float aligned;
    std::memcpy(&aligned, &magnitude, 4);
    aligned += 0.5f;
    uint32_t result;
    std::memcpy(&result, &aligned, 4);
    return uint16_t(sign | (result - 0x3f000000u));
  }
  uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude + 0xfffu + odd - 0x38000000u) >> 13));
}

BAM_INLINE Vec<float> widen(Halves h, f16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = f16_to_float(h[i]);
  return v;
#endif
}
BAM_INLINE Halves narrow(Vec<float> v, f16) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Halves h;
  for (int i = 0; i < kLanes<float>; ++i) h[i] = float_to_f16(v[i]);
  return h;
#endif
}

template <class S, class = std::enable_if_t<sizeof(S) == 2>>
BAM_INLINE Vec<float> load(const S* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, S{});
}

BAM_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
BAM_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
template <class S, class = std::enable_if_t<sizeof(S) == 2>>
BAM_INLINE void store(S* p, Vec<float> v) {
  Halves h = narrow(v, S{});
  std::memcpy(p, &h, sizeof h);
}

// The first n lanes, 0 < n <= lanes; the others are zero.
template <class S>
BAM_INLINE Vec<Acc<S>> load_n(const S* p, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>)
    return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#endif
  S part[kLanes<Acc<S>>] = {};
  std::memcpy(part, p, size_t(n) * sizeof(S));
  return load(part);
}
template <class S>
BAM_INLINE void store_n(S* p, Vec<Acc<S>> v, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
    return;
  }
#endif
  S part[kLanes<Acc<S>>];
  store(part, v);
  std::memcpy(p, part, size_t(n) * sizeof(S));
}

// --- arithmetic -------------------------------------------------------------------------------

// Lanes added as a tree: the order depends on the width of the vector alone.
template <class A>
BAM_INLINE A sum(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps((__m512)v);
  else return _mm512_reduce_add_pd((__m512d)v);
#else
  A part[kLanes<A>];
  std::memcpy(part, &v, sizeof v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
#endif
}

// NaN stays NaN in both.
template <class A>
BAM_INLINE Vec<A> relu(Vec<A> v) {
  return (v < zero<A>()) ? zero<A>() : v;
}
template <class A>
BAM_INLINE Vec<A> maximum(Vec<A> a, Vec<A> b) {
  return ((a > b) | (a != a)) ? a : b;
}

template <class A>
BAM_INLINE Vec<A> reciprocal(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {  // v is finite and not tiny: see Map::factored
    Vec<A> r = (Vec<A>)_mm512_rcp14_ps((__m512)v);
    return r + r * (splat(A(1)) - v * r);
  }
#endif
  return splat(A(1)) / v;
}

// 2^n for integral n with exponents of the type's normal range.
BAM_INLINE Vec<float> power_of_2(typename VecTypes<float>::ints n) {
  return (Vec<float>)((n + 127) << 23);
}
BAM_INLINE Vec<double> power_of_2(typename VecTypes<double>::ints n) {
  return (Vec<double>)((n + 1023) << 52);
}

// e^x to about one unit in the last place; 0 and infinity where the type ends; NaN stays NaN.
template <class A>
BAM_INLINE Vec<A> exp(Vec<A> x) {
  using Ints = typename VecTypes<A>::ints;
  constexpr bool kSingle = std::is_same_v<A, float>;
  const Vec<A> high = splat(A(kSingle ? 89.0 : 710.0)), low = splat(A(kSingle ? -104.0 : -746.0));
  x = (x > high) ? high : x;
  x = (x < low) ? low : x;
  // Adding 1.5 * 2^mantissa rounds to an integer, in the low bits of the sum.
  const Vec<A> magic = splat(A(kSingle ? 12582912.0 : 6755399441055744.0));
  Vec<A> shifted = x * splat(A(1.4426950408889634)) + magic;
  Vec<A> n = shifted - magic;
  Ints k = (Ints)shifted - (Ints)magic;
  // n * ln 2 in two parts, of which the first has few enough bits for an exact product.
  Vec<A> r = x - n * splat(A(kSingle ? 0.693359375 : 0.693145751953125));
  r = r - n * splat(A(kSingle ? -2.12194440e-4 : 1.42860682030941723212e-6));
  Vec<A> p;
  if constexpr (kSingle) {
    p = splat(1.9875691500e-4f);  // Cephes, expf
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
  } else {
    p = splat(1.0 / 6227020800.0);  // Taylor, to r^13 / 13! with |r| <= ln 2 / 2
    p = p * r + splat(1.0 / 479001600.0);
    p = p * r + splat(1.0 / 39916800.0);
    p = p * r + splat(1.0 / 3628800.0);
    p = p * r + splat(1.0 / 362880.0);
    p = p * r + splat(1.0 / 40320.0);
    p = p * r + splat(1.0 / 5040.0);
    p = p * r + splat(1.0 / 720.0);
    p = p * r + splat(1.0 / 120.0);
    p = p * r + splat(1.0 / 24.0);
    p = p * r + splat(1.0 / 6.0);
    p = p * r + splat(0.5);
    p = p * (r * r) + r + splat(1.0);
  }
  Ints half = k >> 1;  // in two steps: the result may be subnormal, or infinite
  return p * power_of_2(half) * power_of_2(k - half);
}

template <class A>
BAM_INLINE Vec<A> sigmoid(Vec<A> z) {
  return splat(A(1)) / (splat(A(1)) + exp<A>(zero<A>() - z));
}

template <class S, class A = Acc<S>>
inline A dot(const S* a, const A* b, int64_t n) {
  constexpr int W = kLanes<A>;
  Vec<A> s0 = zero<A>(), s1 = s0;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + W) * load(b + i + W);
  }
  for (; i < n; i += W) {
    int left = n - i < W ? int(n - i) : W;
    s0 += load_n(a + i, left) * load_n(b + i, left);
  }
  return sum<A>(s0 + s1);
}

} // namespace BAM_ISA
} // namespace bam
