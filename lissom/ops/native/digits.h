// Activations of 16 bits as integers of two bytes, with a scale for each span of inputs: VNNI multiplies them with weights of four and
// eight bits as these are stored, which takes a third of the instructions of widening each weight to a float.
//
// They keep 2^-16 of the largest value of a span, which bfloat16 has rounded by 2^-9 and float16 by 2^-12.
#pragma once

#include "tile.h"

#include <cmath>
#include <limits>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define LISSOM_DIGITS
#endif

namespace lissom {

constexpr int64_t kLongestSpan = 128;  // sums of products of a byte, times 256, fit 32 bits

// The inputs with one scale: the most that divide a group of the weight, in fours; 0 if none do.
inline int64_t span_of(int64_t group) {
  for (int64_t span = std::min(group, kLongestSpan) / 4 * 4; span > 0; span -= 4)
    if (group % span == 0) return span;
  return 0;
}

// x ≈ scale (256 high + low), of rows of `inputs` values in `spans` spans.
struct Digits {
  int64_t inputs = 0, span = 0, spans = 0;
  std::vector<int8_t> bytes{};   // [rows, 2, inputs]: low, high
  std::vector<float> scales{};   // [rows, spans]
  std::vector<int32_t> sums{};   // [rows, spans], of the integers

  // A byte of four neighbouring inputs.
  int32_t four(int64_t row, bool high, int64_t place) const {
    int32_t found;
    std::memcpy(&found, bytes.data() + (2 * row + high) * inputs + place, sizeof found);
    return found;
  }
  int32_t sum(int64_t row, int64_t index) const { return sums[row * spans + index]; }
  float scale(int64_t row, int64_t index) const { return scales[row * spans + index]; }

#if defined(LISSOM_DIGITS)
  template <typename T>
  void fill(const T* x, int64_t rows, int64_t width, int64_t length) {
    inputs = width, span = length, spans = width / length;
    bytes.resize(rows * 2 * inputs), scales.resize(rows * spans), sums.resize(rows * spans);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t index = 0; index < spans; ++index) fill_span(x + row * inputs + index * span, row, index);
  }

 private:
  template <typename T>
  void fill_span(const T* x, int64_t row, int64_t index) {
    constexpr float most = 127.0f * 256;
    Vec largest = splat(0.0f), nothing = splat(0.0f);
    for (int64_t i = 0; i < span; i += kLanes) {
      Vec value = load_some(x + i, span - i);
      largest = (Vec)_mm512_max_ps((__m512)largest, _mm512_abs_ps((__m512)value));
      nothing += value * splat(0.0f);
    }
    float size = _mm512_reduce_max_ps((__m512)largest), factor = most / size;
    const bool finite = lissom::sum(nothing) == 0, some = finite && std::isfinite(factor);  // else no value is above 1e-34
    scales[row * spans + index] = some ? size / most : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    IntVec total = {};
    int8_t* to = bytes.data() + 2 * row * inputs + index * span;
    for (int64_t i = 0; i < span; i += kLanes) {
      Vec value = load_some(x + i, span - i) * splat(some ? factor : 0.0f);
      __m512i whole = _mm512_cvtps_epi32((__m512)value);
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);  // the low byte is signed
      __mmask16 lanes = span - i >= kLanes ? 0xffff : (1 << (span - i)) - 1;
      _mm512_mask_cvtepi32_storeu_epi8(to + i, lanes, whole);
      _mm512_mask_cvtepi32_storeu_epi8(to + inputs + i, lanes, high);
      total += (IntVec)whole;
    }
    sums[row * spans + index] = _mm512_reduce_add_epi32((__m512i)total);
  }
#endif
};

}  // namespace lissom
