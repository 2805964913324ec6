// SIMD vectors as wide as the machine's registers, in the compiler's vector types: one source for AVX-512, AVX2 and NEON.
#pragma once

#include "tensor.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lissom {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats a register holds
constexpr int kRows = 14;   // rows of a tile: 14 x 2 sums, 2 columns and 1 broadcast fill 31 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 6;    // 6 x 2 sums, 2 columns and 1 broadcast fill 15 of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kRows = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));  // sums wrap around

using c10::BFloat16;
using c10::Half;

inline Vec splat(float value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(value);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(value);  // written lane by lane, GCC emits five instructions for it in the inner loop
#else
  Vec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = value;
  return found;
#endif
}

// a * b + sum, rounded once where the machine can: sums that must not depend on how the compiler arranges a loop.
inline Vec multiply_add(Vec a, Vec b, Vec sum) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__) && defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

inline Vec load(const float* from) {
  Vec found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  Vec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = static_cast<float>(from[lane]);
  return found;
#endif
}

// The upper halves of the lanes, rounded to the nearest, ties to even; NaN stays NaN.
inline BitVec rounded_halves(Vec value) {
  BitVec bits = (BitVec)value;
  BitVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value == value ? rounded : (bits >> 16) | 0x40;
}

inline void store(BFloat16* to, Vec value) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#elif defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)rounded_halves(value)));
#elif defined(__AVX2__)
  __m256i halves = (__m256i)rounded_halves(value);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<BFloat16>(value[lane]);
#endif
}

inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = static_cast<float>(from[lane]);
  return found;
#endif
}

// From an element of an array of float16 or float32 on.
inline Vec load_floats(const void* from, bool half, int64_t place) {
  return half ? load(static_cast<const Half*>(from) + place) : load(static_cast<const float*>(from) + place);
}

inline IntVec widen(const int8_t* from) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  IntVec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = from[lane];
  return found;
#endif
}

inline IntVec widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  IntVec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = from[lane];
  return found;
#endif
}

inline Vec to_floats(IntVec value) { return __builtin_convertvector(value, Vec); }
inline Vec load(const int8_t* from) { return to_floats(widen(from)); }
inline Vec load(const uint8_t* from) { return to_floats(widen(from)); }

// Loads or stores the first `count` lanes only, none for a negative count; other lanes read as zero and are not written.
template <typename T>
inline Vec load_some(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T held[kLanes] = {};
  std::copy(from, from + std::max<int64_t>(count, 0), held);
  return load(held);
}

template <typename T>
inline void store_some(T* to, Vec value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  T held[kLanes];
  store(held, value);
  std::copy(held, held + std::max<int64_t>(count, 0), to);
}

// The first `count` lanes of a value; the others are 0.
inline Vec first_lanes(Vec value, int64_t count) {
  if (count >= kLanes) return value;
  float held[kLanes];
  store(held, value);
  return load_some(held, count);
}

// (-b, a) for each two adjacent lanes (a, b).
inline Vec quarter_turn(Vec value) {
#if defined(__AVX512F__)
  Vec swapped = (Vec)_mm512_permute_ps((__m512)value, _MM_SHUFFLE(2, 3, 0, 1));
#elif defined(__AVX2__)
  Vec swapped = (Vec)_mm256_permute_ps((__m256)value, _MM_SHUFFLE(2, 3, 0, 1));
#else
  Vec swapped;
  for (int lane = 0; lane < kLanes; ++lane) swapped[lane] = value[lane ^ 1];
#endif
  BitVec signs{};
  for (int lane = 0; lane < kLanes; lane += 2) signs[lane] = 0x80000000u;
  return (Vec)((BitVec)swapped ^ signs);
}

// Each lane of the lower half, or of the upper one, twice.
template <int upper>
inline Vec each_twice(Vec value) {
  constexpr int kFirst = upper * kLanes / 2;
#if defined(__AVX512F__)
  const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(kFirst), _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7));
  return (Vec)_mm512_permutexvar_ps(places, (__m512)value);
#elif defined(__AVX2__)
  const __m256i places = _mm256_add_epi32(_mm256_set1_epi32(kFirst), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
  return (Vec)_mm256_permutevar8x32_ps((__m256)value, places);
#else
  Vec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = value[kFirst + lane / 2];
  return found;
#endif
}

// A lane where a or b is NaN yields b.
inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Likewise.
inline Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

inline float sum(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
#endif
}

inline float largest(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float found = value[0];
  for (int lane = 1; lane < kLanes; ++lane) found = std::max(found, value[lane]);
  return found;
#endif
}

inline float smallest(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps((__m512)value);
#else
  float found = value[0];
  for (int lane = 1; lane < kLanes; ++lane) found = std::min(found, value[lane]);
  return found;
#endif
}

// The lanes that are NaN.
#if defined(__AVX512F__)
using Mask = __mmask16;
inline Mask is_nan(Vec value) { return _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q); }
inline bool any(Mask mask) { return mask != 0; }
#else
using Mask = IntVec;
inline Mask is_nan(Vec value) { return value != value; }
inline bool any(Mask mask) {
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
  return found != 0;
}
#endif

// Rounds to the nearest integer, ties to even.
inline IntVec nearest(Vec value) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtps_epi32((__m256)value);
#else
  IntVec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = static_cast<int32_t>(std::nearbyint(value[lane]));
  return found;
#endif
}

// The same as floating point: any magnitude, and NaN stays NaN.
inline Vec rounded(Vec value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vec)_mm256_round_ps((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = std::nearbyint(value[lane]);
  return value;
#endif
}

// e^x within 2 ulp: 2^n times a polynomial in the rest (Cephes expf); exactly 0 below -88, so that -inf masks completely, infinite
// above 88.37, and NaN for NaN.
inline Vec exponential(Vec x) {
  x = maximum(splat(-88.02969f), x);
  IntVec large = x > splat(88.37f);
  Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  Vec n = shifted - 12582912.0f;
  x = x - n * 0.693359375f;
  x = x - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * (x * x) + x + 1.0f;
  BitVec bits = ((BitVec)shifted << 23) + (127u << 23);
  return large ? splat(std::numeric_limits<float>::infinity()) : p * (Vec)bits;
}

inline Vec hyperbolic_tangent(Vec x) {
  Vec e = exponential(x * 2.0f);
  return 1.0f - 2.0f / (e + 1.0f);
}

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu, kSquaredRelu };

#if defined(__AVX512F__)

// Φ(a) - 1/2 for a >= 0, Φ the normal distribution: Taylor's polynomials about sixteen points kStep apart, in a / kStep; beyond
// the last it is 1/2.  1.1e-7 absolute.
struct HalfNormal {
  static constexpr float kStep = 0.36f;
  alignas(64) float terms[6][16] = {};

  HalfNormal() {
    for (int i = 0; i < 15; ++i) {
      double m = kStep * static_cast<double>(i), density = std::exp(-m * m / 2) / std::sqrt(2 * 3.14159265358979323846);
      double slopes[6] = {0, 1, -m, m * m - 1, 3 * m - m * m * m, m * m * m * m - 6 * m * m + 3};  // of Φ, over the density
      terms[0][i] = std::erf(m / std::sqrt(2.0)) / 2;
      for (double scale = kStep, k = 1; k < 6; ++k, scale *= kStep / k) terms[int(k)][i] = density * slopes[int(k)] * scale;
    }
    terms[0][15] = 0.5f;
  }
};

inline const HalfNormal kHalfNormal;

// x Φ(x) = x / 2 + |x| (Φ(|x|) - 1/2)
inline Vec gelu(Vec x) {
  __m512 positive = _mm512_abs_ps((__m512)x);
  __m512 place = _mm512_min_ps(_mm512_mul_ps(positive, _mm512_set1_ps(1 / HalfNormal::kStep)), _mm512_set1_ps(15.0f));
  __m512i index = _mm512_cvtps_epi32(place);
  Vec rest = (Vec)_mm512_sub_ps(place, _mm512_cvtepi32_ps(index));
  auto term = [&](int k) { return (Vec)_mm512_permutexvar_ps(index, _mm512_load_ps(kHalfNormal.terms[k])); };
  Vec p = term(5);
#pragma GCC unroll 5
  for (int k = 4; k >= 0; --k) p = p * rest + term(k);
  return x * 0.5f + (Vec)positive * p;
}

#else

// x Φ(x), Φ the normal distribution; Abramowitz and Stegun 7.1.26 for the tail, 1.5e-7 absolute.
inline Vec gelu(Vec x) {
  Vec z = x * 0.70710678f;
  Vec positive = maximum(z, -z);
  Vec t = 1.0f / (1.0f + 0.3275911f * positive);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Vec tail = 0.5f * p * t * exponential(-z * z);
  return x * (x < splat(0.0f) ? tail : 1.0f - tail);
}

#endif

inline Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kRelu:
      return x < splat(0.0f) ? splat(0.0f) : x;  // NaN stays
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:  // Hendrycks and Gimpel 2016: x/2 (1 + tanh u) is x sigmoid(2u)
      return x / (1.0f + exponential(x * (x * x * 0.044715f + 1.0f) * (-2.0f * 0.79788456f)));
    case Activation::kSilu:
      return x / (1.0f + exponential(-x));
    case Activation::kSquaredRelu:
      return x < splat(0.0f) ? splat(0.0f) : x * x;
    default:
      return x;
  }
}

}  // namespace lissom
