// Weight-only quantized linear layers (W8A16, W4A16): the weight has 4, 5, 6 or 8 bits and group-wise scales, and
// w ≈ (q - zero) scale with integer zero points, or w ≈ q scale - shift with zero points in floating point. fp8 is e4m3, fp4 is
// e2m1, and scales may be e8m0, or e4m3 times one number for the tensor.
//
// For few rows the weight is dequantized in registers, since such calls are bound by memory, or multiplied as it is with digits of
// x. For more rows a panel is dequantized once into the layout of a packed float weight.
#pragma once

#include "digits.h"
#include "linear.h"

#include <torch/headeronly/util/Float8_e4m3fn.h>

#include <type_traits>
#include <vector>

namespace lissom {

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool kHasWeightQuantized = true;
#else
constexpr bool kHasWeightQuantized = false;
#endif

// The most rows for which a weight of some bits is dequantized in registers; for more, a panel is dequantized to P first.
template <typename P>
constexpr int64_t few_rows_of(int bits) {
#if defined(__AVX512F__)
  return std::is_same_v<P, float> ? 4 * kRows : kRows;
#else  // dequantizing int8 takes no more time than loading floats from the L2 cache
  return bits < 8 ? 24 : std::numeric_limits<int64_t>::max();
#endif
}

constexpr int64_t kFewStoredRows = 20;  // the same for a weight that is multiplied as it is stored

enum class Form { kInt8, kUint8, kFp8, kInt6, kInt5, kUint5, kInt4, kUint4, kFp4 };
constexpr bool is_signed(Form form) { return form != Form::kUint8 && form != Form::kUint5 && form != Form::kUint4; }
constexpr int bits_of(Form form) {
  if (form == Form::kInt8 || form == Form::kUint8 || form == Form::kFp8) return 8;
  if (form == Form::kInt6) return 6;
  return form == Form::kInt5 || form == Form::kUint5 ? 5 : 4;
}
constexpr int64_t step_bytes(Form form) { return kPanel * bits_of(form) / 8; }

// Calls work(std::integral_constant<Form, form>): dispatches a format known at run time to a template.
template <typename Work>
inline void with_form(Form form, Work&& work) {
  switch (form) {
    case Form::kInt8: return work(std::integral_constant<Form, Form::kInt8>{});
    case Form::kUint8: return work(std::integral_constant<Form, Form::kUint8>{});
    case Form::kFp8: return work(std::integral_constant<Form, Form::kFp8>{});
    case Form::kInt6: return work(std::integral_constant<Form, Form::kInt6>{});
    case Form::kInt5: return work(std::integral_constant<Form, Form::kInt5>{});
    case Form::kUint5: return work(std::integral_constant<Form, Form::kUint5>{});
    case Form::kInt4: return work(std::integral_constant<Form, Form::kInt4>{});
    case Form::kUint4: return work(std::integral_constant<Form, Form::kUint4>{});
    case Form::kFp4: return work(std::integral_constant<Form, Form::kFp4>{});
  }
}

constexpr float kFp4[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// A number of e4m3, with its bits in place in float16, is this much smaller: the exponent of float16 is offset by 8 more.
constexpr float kFp8Factor = 256.0f;

// Numbers of e4m3 but for NaN, divided by kFp8Factor. A byte is sign-extended and shifted; bit 14, a copy of the sign, is cleared.
inline __attribute__((always_inline)) void load_fp8(const uint8_t* from, Vec (&to)[kWide]) {
#if defined(__AVX512BW__)
  static_assert(kWide * kLanes == 32);
  __m512i bytes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  __m512i halves = _mm512_and_si512(_mm512_slli_epi16(bytes, 7), _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
  to[0] = (Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  to[1] = (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
#elif defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
  static_assert(kWide * kLanes == 16);
  __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  __m256i halves = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  to[0] = (Vec)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  to[1] = (Vec)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#else
  for (int i = 0; i < kWide * kLanes; ++i)
    to[i / kLanes][i % kLanes] = c10::detail::fp8e4m3fn_to_fp32_value(from[i]) / kFp8Factor;
#endif
}

// Scales in e4m3, divided by kFp8Factor; NaN stays NaN.
inline Vec load_fp8_scales(const uint8_t* from) {
#if defined(__AVX512BW__)
  __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  __m256i rest = _mm256_set1_epi16(0x7f), none = _mm256_cmpeq_epi16(_mm256_and_si256(bytes, rest), rest);
  __m256i halves = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  return (Vec)_mm512_cvtph_ps(_mm256_or_si256(halves, none));
#elif defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
  __m128i bytes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  __m128i rest = _mm_set1_epi16(0x7f), none = _mm_cmpeq_epi16(_mm_and_si128(bytes, rest), rest);
  __m128i halves = _mm_and_si128(_mm_slli_epi16(bytes, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
  return (Vec)_mm256_cvtph_ps(_mm_or_si128(halves, none));
#else
  Vec found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = c10::detail::fp8e4m3fn_to_fp32_value(from[lane]) / kFp8Factor;
  return found;
#endif
}

// Powers of two in e8m0.
inline Vec load_powers(const uint8_t* from) {
  IntVec bytes = widen(from);
  IntVec bits = bytes == 0 ? IntVec{} + 0x00400000 : bytes << 23;
  return (Vec)(bytes == 255 ? IntVec{} + 0x7fc00000 : bits);
}

enum class ScaleKind { kFloat, kHalf, kPower, kFp8 };

struct QuantizedWeight {
  const uint8_t* q;      // [panels, inputs, step_bytes]; below eight bits columns c and c + 16 share a byte of their lowest four
                         // bits, and after these bytes the other bits follow column by column
  Form form;
  const void* scale;     // [panels, groups, kPanel], of scale_kind
  ScaleKind scale_kind;
  float factor;          // multiplied with every scale: of the tensor, and kFp8Factor for the elements and the scales in e4m3
  const uint8_t* zero;   // likewise, or null
  const void* shift;     // likewise, float16 or float32, or null
  bool half_shift;
  int64_t inputs, groups;

  const uint8_t* panel(int64_t index) const { return q + index * inputs * step_bytes(form); }

  bool has_zeros() const { return zero || shift; }
  Vec scales(int64_t group, int64_t column) const {
    int64_t place = place_of(group, groups, column);
    const uint8_t* byte = static_cast<const uint8_t*>(scale) + place;
    if (scale_kind == ScaleKind::kPower) return load_powers(byte) * splat(factor);
    if (scale_kind == ScaleKind::kFp8) return load_fp8_scales(byte) * splat(factor);
    return load_floats(scale, scale_kind == ScaleKind::kHalf, place) * splat(factor);
  }
  Vec shifts(int64_t group, int64_t column) const {
    return shift ? load_floats(shift, half_shift, place_of(group, groups, column)) : splat(0.0f);
  }
  Vec zeros(int64_t group, int64_t column) const { return zero ? load(zero + place_of(group, groups, column)) : splat(0.0f); }
};

// Converts a chunk of a panel's row of weights to floats, before zero point and scale.
template <Form form>
struct Decoder {
#if defined(__AVX512F__)
  static constexpr int kRest = bits_of(form) - 4;  // bits of an element besides the lowest four
  __m512 table, upper;
  __m512i places, halves, fifteen = _mm512_set1_epi32(15);  // halves: the table twice in bfloat16; lookups read five bits

  Decoder() {
    alignas(64) float values[16], others[16];
    alignas(64) int32_t turns[16];
    alignas(64) BFloat16 shorter[32];
    for (int i = 0; i < 16; ++i) {
      values[i] = form == Form::kFp4 ? kFp4[i] : kRest == 0 && is_signed(form) && i > 7 ? i - 16 : i;
      others[i] = is_signed(form) ? i - 16 : i + 16;
      shorter[i] = shorter[i + 16] = BFloat16(values[i]);
      turns[i] = kRest == 1 ? (i + 28) % 32 : 30 - 2 * i;
    }
    table = _mm512_load_ps(values), upper = _mm512_load_ps(others), places = _mm512_load_si512(turns);
    halves = _mm512_load_si512(shorter);
  }

  inline __attribute__((always_inline)) void four_bits(const uint8_t* from, int, Vec (&to)[kWide]) const {
    IntVec both = widen(from);  // the lookup reads the lowest four bits of the index
    to[0] = (Vec)_mm512_permutexvar_ps((__m512i)both, table);
    to[1] = (Vec)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)both, 4), table);
  }

#if defined(__AVX512BW__)
  // Two rows of a panel's weights, of four bits, in bfloat16: pairs of each column.
  inline __attribute__((always_inline)) void pairs_of_four_bits(const uint8_t* from, BFloat16* to) const {
    __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + 1);
    __m512i both = _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second)));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(both, halves));
    _mm512_storeu_si512(to + kPanel, _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), halves));
  }
#endif

  inline __attribute__((always_inline)) void more_bits(const uint8_t* from, int, Vec (&to)[kWide]) const {
    constexpr int kLowest = 0xD8;  // a ternary operation: the lowest four bits of the second operand, the others of the first
    __m512i both = (__m512i)widen(from);
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      __m512i low = v ? _mm512_srli_epi32(both, 4) : both;
      int32_t word;  // the further bits of 32 or 16 columns
      std::memcpy(&word, from + kPanel / 2 + (kRest == 2 ? v * 4 : 0), sizeof word);
      __m512i rest = _mm512_set1_epi32(word);
      if constexpr (kRest == 1) {
        // A rotation brings each column's bit to the fifth place, and the lookup reads five.
        rest = _mm512_rorv_epi32(v ? _mm512_ror_epi32(rest, kLanes) : rest, places);
        to[v] = (Vec)_mm512_permutex2var_ps(table, _mm512_ternarylogic_epi32(rest, low, fifteen, kLowest), upper);
      } else {
        static_assert(kRest != 2 || is_signed(form));
        rest = _mm512_srai_epi32(_mm512_sllv_epi32(rest, places), 26);
        to[v] = (Vec)_mm512_cvtepi32_ps(_mm512_ternarylogic_epi32(rest, low, fifteen, kLowest));
      }
    }
  }
#else
  inline __attribute__((always_inline)) void four_bits(const uint8_t* from, int column, Vec (&to)[kWide]) const {
    static_assert(kChunk <= kPanel / 2);
    const int left = column < kPanel / 2 ? 28 : 24;  // shifts a column's four bits to the top
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      IntVec top = widen(from + column % (kPanel / 2) + v * kLanes) << left;
      if constexpr (form == Form::kFp4) to[v] = fp4_values((top >> 28) & 15);
      else to[v] = to_floats(is_signed(form) ? top >> 28 : (top >> 28) & 15);
    }
  }

  inline __attribute__((always_inline)) static Vec fp4_values(IntVec codes) {
#if defined(__AVX2__)
    __m256 sizes = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kFp4), (__m256i)codes);  // reads three bits of the code
    return (Vec)((BitVec)(Vec)sizes | (BitVec)((codes & 8) << 28));
#else
    Vec found;
    for (int lane = 0; lane < kLanes; ++lane) found[lane] = kFp4[codes[lane]];
    return found;
#endif
  }

  inline __attribute__((always_inline)) void more_bits(const uint8_t* from, int column, Vec (&to)[kWide]) const {
    constexpr int rest = bits_of(form) - 4, kept = is_signed(form) ? ~15 : ((1 << rest) - 1) << 4;
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      int c = column + v * kLanes, place = c * rest;
      uint32_t word;
      std::memcpy(&word, from + kPanel / 2 + place / 32 * 4, sizeof word);
      BitVec left;  // shifts a column's bits to the top
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) left[lane] = 32 - rest * (lane + 1) - place % 32;
      IntVec low = (widen(from + c % (kPanel / 2)) >> (c < kPanel / 2 ? 0 : 4)) & 15;
      to[v] = to_floats(low | ((IntVec)((BitVec{} + word) << left) >> (28 - rest) & kept));
    }
  }
#endif

  inline __attribute__((always_inline)) void operator()(const uint8_t* from, int column, Vec (&to)[kWide]) const {
    if constexpr (bits_of(form) == 4) return four_bits(from, column, to);
    if constexpr (form == Form::kFp8) return load_fp8(from + column, to);
    if constexpr (bits_of(form) == 5 || bits_of(form) == 6) return more_bits(from, column, to);
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      const uint8_t* place = from + column + v * kLanes;
      to[v] = is_signed(form) ? load(reinterpret_cast<const int8_t*>(place)) : load(place);
    }
  }
};

// True for weights that VNNI multiplies with the digits of x.
template <typename T>
constexpr bool multiplies_as_stored([[maybe_unused]] Form form) {
#if defined(LISSOM_DIGITS)
  return !std::is_same_v<T, float> && form != Form::kFp8 && form != Form::kFp4 && (bits_of(form) == 4 || bits_of(form) == 8);
#else
  return false;
#endif
}

#if defined(LISSOM_DIGITS)
// Weights of four and eight bits as unsigned bytes, plus kRaised, four inputs of a column side by side: what VNNI multiplies.
template <Form form>
struct Fours {
  static constexpr int kRaised = form == Form::kInt8 ? 128 : form == Form::kInt4 ? 8 : 0;
  __m512i first, second;  // the places of the bytes of columns 0 to 15 and 16 to 31

  Fours() {
    constexpr int row = step_bytes(form);
    alignas(64) uint8_t places[2][64];
    for (int i = 0; i < 64; ++i) {
      places[0][i] = i % 4 * row + i / 4;
      places[1][i] = places[0][i] + 16;
    }
    first = _mm512_load_si512(places[0]), second = _mm512_load_si512(places[1]);
  }

  inline __attribute__((always_inline)) void operator()(const uint8_t* from, __m512i (&to)[kWide]) const {
    __m512i low = _mm512_loadu_si512(from);
    if constexpr (bits_of(form) == 8) {
      __m512i high = _mm512_loadu_si512(from + 64);
      to[0] = _mm512_permutex2var_epi8(low, first, high);
      to[1] = _mm512_permutex2var_epi8(low, second, high);
      if constexpr (kRaised != 0)
        for (int v = 0; v < kWide; ++v) to[v] = _mm512_xor_si512(to[v], _mm512_set1_epi8(-128));
    } else {
      const __m512i fifteen = _mm512_set1_epi8(15);
      __m512i both = _mm512_permutexvar_epi8(first, low);
      if constexpr (kRaised != 0) both = _mm512_xor_si512(both, _mm512_set1_epi8(-120));
      to[0] = _mm512_and_si512(both, fifteen);
      to[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen);
    }
  }
};
#endif

// Interleaves two rows of weights in the layout of a packed bfloat16 weight.
#if defined(__AVX512BF16__)
inline void store_pairs(BFloat16* to, Vec first, Vec second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), pairs));
}
#else
inline void store_pairs(BFloat16* to, Vec first, Vec second) {
  BitVec pairs = rounded_halves(first) | (rounded_halves(second) << 16);
  std::memcpy(to, &pairs, sizeof pairs);
}
#endif

// Sums of `count` groups of x, one after the other.
template <typename S>
void group_sums(const S* x, int64_t count, int64_t size, std::vector<float>& sums) {
  sums.resize(count);
  for (int64_t i = 0; i < count; ++i, x += size) {
    Vec total = splat(0.0f);
    for (int64_t c = 0; c < size; c += kLanes) total += load_some(x + c, size - c);
    sums[i] = sum(total);
  }
}

// P: the dtype in which the dequantized panel is multiplied with x.
template <typename T, typename P>
struct WeightQuantized {
  static constexpr bool kSharesRows = true;
  static constexpr int64_t kProductRows = 0, kFewRows = 0;
  const T* x;  // [rows, inputs]
  QuantizedWeight weight;
  int64_t rows;
  int64_t origin = 0;           // the first row of `floats` and `sums`
  std::vector<float> floats{};  // x in float32, where it is multiplied so and is not float32
  std::vector<float> sums{};    // of x per group, [rows, groups], where there are zero points
  Digits digits{};              // of x, where the weight is multiplied as it is

  bool direct() const {
    return rows <= (multiplies_as_stored<T>(weight.form) ? kFewStoredRows : few_rows_of<P>(bits_of(weight.form)));
  }
  int64_t row_bytes() const { return weight.inputs * sizeof(T); }

  void prepare(int64_t begin, int64_t end) {
    int64_t n = weight.inputs;
    origin = begin;
    const bool widens = !std::is_same_v<T, float> && (direct() || std::is_same_v<P, float>);
    if (widens && !(direct() && fill_digits(begin, end))) widen(x + begin * n, (end - begin) * n, floats);
    if (direct() && weight.has_zeros()) group_sums(x + begin * n, (end - begin) * weight.groups, n / weight.groups, sums);
  }

  // The dequantized panel in thread-local memory; null where the weight is dequantized in registers.
  const P* open(int64_t panel, int64_t) const {
    if (direct()) return nullptr;
    thread_local std::vector<P> held;
    held.resize(weight.inputs * kPanel);
    with_form(weight.form, [&](auto form) { decode<decltype(form)::value>(panel, held.data()); });
    return held.data();
  }

  template <int R, bool fetches>
  void tile(const P* opened, int64_t row, int64_t panel, int column, Vec (&totals)[R][kWide], bool) const {
    constexpr int pair = kPair<P>;
    if (!opened)
      return with_form(weight.form, [&](auto form) {
        constexpr Form kForm = decltype(form)::value;
#if defined(LISSOM_DIGITS)
        if constexpr (multiplies_as_stored<T>(kForm))
          if (digits.span) return digit_tile<kForm>(row, panel, totals);
#endif
        direct_tile<kForm>(row, panel, column, totals);
      });
    const P* from;
    if constexpr (std::is_same_v<T, P>) from = x + row * weight.inputs;
    else from = values(row);
    multiply_in_parts<R, false>(from, weight.inputs, opened + column * pair, totals);
  }

 private:
  const float* values(int64_t row) const {
    if constexpr (std::is_same_v<T, float>) return x + row * weight.inputs;
    else return floats.data() + (row - origin) * weight.inputs;
  }

  // Sets `digits`; false where the weight is widened to floats.
  bool fill_digits([[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) {
#if defined(LISSOM_DIGITS)
    if (int64_t span = span_of(weight.inputs / weight.groups); span && multiplies_as_stored<T>(weight.form)) {
      digits.fill(x + begin * weight.inputs, end - begin, weight.inputs, span);
      return true;
    }
#endif
    return false;
  }

  template <Form form>
  void decode(int64_t panel, P* to) const {
    constexpr int pair = kPair<P>, chunks = kPanel / kChunk;
    int64_t group = weight.inputs / weight.groups;
    const uint8_t* from = weight.panel(panel);
    const Decoder<form> decoder;
    Vec scales[chunks][kWide], zeros[chunks][kWide], shifts[chunks][kWide], weights[chunks][pair][kWide];
    int64_t i = 0;
    for (int64_t g = 0; g < weight.groups; ++g) {
      for (int v = 0; v < chunks * kWide; ++v) {
        scales[v / kWide][v % kWide] = weight.scales(g, panel * kPanel + v * kLanes);
        zeros[v / kWide][v % kWide] = weight.zeros(g, panel * kPanel + v * kLanes);
        shifts[v / kWide][v % kWide] = weight.shifts(g, panel * kPanel + v * kLanes);
      }
      for (int64_t end = i + group; i < end; ++i, from += step_bytes(form)) {
#pragma GCC unroll 4
        for (int chunk = 0; chunk < chunks; ++chunk) {
          Vec(&found)[kWide] = weights[chunk][i % pair];
          decoder(from, chunk * kChunk, found);
#pragma GCC unroll 2
          for (int v = 0; v < kWide; ++v) {
            found[v] = (found[v] - zeros[chunk][v]) * scales[chunk][v] - shifts[chunk][v];
            int column = chunk * kChunk + v * kLanes;
            if constexpr (pair == 1) store(to + i * kPanel + column, found[v]);
            else if (i % 2) store_pairs(to + (i - 1) * kPanel + column * 2, weights[chunk][0][v], found[v]);
          }
        }
      }
    }
  }

#if defined(LISSOM_DIGITS)
  template <Form form, int R>
  void digit_tile(int64_t row, int64_t panel, Vec (&totals)[R][kWide]) const {
    constexpr int most = 4;  // rows at once: 4 x 4 sums, of 32 registers
    const Fours<form> fours;
    const int64_t per_group = digits.spans / weight.groups;
    const uint8_t* from = weight.panel(panel);
    for (int64_t index = 0; index < digits.spans; ++index, from += digits.span * step_bytes(form)) {
      int64_t group = index / per_group;
      Vec scales[kWide];
      IntVec zeros[kWide];
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        int64_t c = panel * kPanel + v * kLanes;
        scales[v] = weight.scales(group, c);
        zeros[v] = IntVec{} + Fours<form>::kRaised;
        if (weight.zero) zeros[v] += widen(weight.zero + place_of(group, weight.groups, c));
      }
      int r = 0;
#pragma GCC unroll 4
      for (; r + most <= R; r += most) add_span<form, most>(fours, from, row - origin + r, index, scales, zeros, totals + r);
      if constexpr (R % most != 0) add_span<form, R % most>(fours, from, row - origin + r, index, scales, zeros, totals + r);
      if (weight.shift && (index + 1) % per_group == 0) subtract_shifts(row, panel, group, totals);
    }
  }

  // Adds the products of a span of R rows. zeros: to subtract from the elements as `Fours` gives them.
  template <Form form, int R>
  inline __attribute__((always_inline)) void add_span(const Fours<form>& fours, const uint8_t* from, int64_t row, int64_t index,
                                                      const Vec (&scales)[kWide], const IntVec (&zeros)[kWide],
                                                      Vec (*totals)[kWide]) const {
    constexpr int64_t step = step_bytes(form);
    __m512i low[R][kWide] = {}, high[R][kWide] = {}, weights[kWide];
    for (int64_t i = 0; i < digits.span; i += 4) {
      for (int line = 0; line < 4 * step; line += 64) __builtin_prefetch(from + i * step + kAhead + line, 0, 2);
      fours(from + i * step, weights);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m512i first = _mm512_set1_epi32(digits.four(row + r, false, index * digits.span + i));
        __m512i second = _mm512_set1_epi32(digits.four(row + r, true, index * digits.span + i));
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) {
          low[r][v] = _mm512_dpbusd_epi32(low[r][v], weights[v], first);
          high[r][v] = _mm512_dpbusd_epi32(high[r][v], weights[v], second);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec scale = splat(digits.scale(row + r, index));
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        IntVec sum = (IntVec)low[r][v] + ((IntVec)high[r][v] << 8) - zeros[v] * digits.sum(row + r, index);
        totals[r][v] += to_floats(sum) * (scales[v] * scale);
      }
    }
  }

  template <int R>
  void subtract_shifts(int64_t row, int64_t panel, int64_t group, Vec (&totals)[R][kWide]) const {
    for (int v = 0; v < kWide; ++v) {
      Vec shift = weight.shifts(group, panel * kPanel + v * kLanes);
      for (int r = 0; r < R; ++r) totals[r][v] -= shift * sums[(row + r - origin) * weight.groups + group];
    }
  }
#endif

  template <Form form, int R>
  void direct_tile(int64_t row, int64_t panel, int column, Vec (&totals)[R][kWide]) const {
    constexpr int64_t step = step_bytes(form);
    constexpr int chains = R == 1 ? 4 : R == 2 ? 2 : 1;  // independent sums, since an addition waits for the one before it
    int64_t group = weight.inputs / weight.groups;
    const uint8_t* from = weight.panel(panel);
    const Decoder<form> decoder;
    for (int64_t g = 0; g < weight.groups; ++g) {
      Vec partial[chains][R][kWide] = {};
      const float* from_group = values(row) + g * group;
      auto take = [&](int64_t i, Vec (&sums)[R][kWide]) {
        Vec found[kWide];
        decoder(from + i * step, column, found);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kWide; ++v) sums[r][v] += splat(from_group[r * weight.inputs + i]) * found[v];
      };
      int64_t i = 0;
      for (; i + chains <= group; i += chains) {
        __builtin_prefetch(from + i * step + kAhead, 0, 2);
#pragma GCC unroll 4
        for (int chain = 0; chain < chains; ++chain) take(i + chain, partial[chain]);
      }
      for (; i < group; ++i) take(i, partial[0]);
      from += group * step;
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        int64_t c = panel * kPanel + column + v * kLanes;
        Vec scale = weight.scales(g, c);
        Vec zero = weight.zeros(g, c), shift = weight.shifts(g, c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          Vec sum = partial[0][r][v];
#pragma GCC unroll 4
          for (int chain = 1; chain < chains; ++chain) sum += partial[chain][r][v];
          if (weight.has_zeros()) {
            float inputs = sums[(row + r - origin) * weight.groups + g];
            sum -= zero * inputs;
            totals[r][v] -= shift * inputs;
          }
          totals[r][v] += sum * scale;
        }
      }
    }
  }
};

}  // namespace lissom
