// The int8 linear layer (W8A8): activations are quantized to uint8 as lissom/ops/formats.py does it, products are summed in int32,
// and the sums are dequantized at the end.
//
//   x W^T  =  scale_x scale_w (sum_i q_i w_i - zero_x sum_i w_i)
//
// With a scale for each group of inputs, of the weight or of x, the sum of each group is dequantized by itself; such weights have
// 8 or 4 bits (W4A8).
#pragma once

#include "amx.h"

#include <cmath>
#include <numeric>
#include <vector>

namespace lissom {

constexpr float kLeastScale = 1e-30f;
constexpr float kLargestByte = 255.0f;
constexpr int64_t kMostInt8Inputs = 1 << 16;  // more products could overflow an int32 sum
constexpr int64_t kQuantizationGrain = 1 << 14;  // elements below which a second thread costs more than it saves

// x is about (q - zero) * scale.
struct Quantization {
  float scale, inverse;
  int32_t zero;
};

inline Quantization quantization_for(float low, float high) {
  float scale = std::max((high - low) / kLargestByte, kLeastScale);
  float zero = std::min(std::max(std::nearbyint(-low / scale), 0.0f), kLargestByte);
  return {scale, 1.0f / scale, static_cast<int32_t>(zero)};
}

// The scale of a row that holds NaN or an infinity: its outputs become NaN.
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Of a row with a known scale. The outputs become NaN where the scale is not finite and positive, as that of a row with NaN.
inline Quantization known_quantization(float scale, float zero) {
  bool fits = std::isfinite(scale) && scale > 0 && zero >= 0 && zero <= kLargestByte;
  return fits ? Quantization{scale, 1.0f / scale, static_cast<int32_t>(zero)} : Quantization{kNaN, 0.0f, 0};
}

struct Range {
  Vec low = splat(0.0f), high = splat(0.0f);
  Mask has_nan{};

  // quantize_row looks for NaN too, so a caller that quantizes the row next need not.
  template <bool finds_nan, typename T>
  void take(const T* x, int64_t n) {
    for (int64_t c = 0; c < n; c += kLanes) {
      Vec value = load_some(x + c, n - c);
      low = minimum(low, value);
      high = maximum(high, value);
      if (finds_nan) has_nan |= is_nan(value);
    }
  }

  Quantization quantization() const {
    Quantization found = quantization_for(smallest(low), largest(high));
    return any(has_nan) || !std::isfinite(found.scale) ? Quantization{kNaN, 0.0f, 0} : found;
  }
};

inline void store_elements(uint8_t* to, IntVec value) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)value));
#elif defined(__AVX2__)
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint8_t>(value[lane]);
#endif
}

// Groups of four in the order 0, 2, 1, 3 of the int16 products.
inline void store_elements(int16_t* to, IntVec value) {
#if defined(__AVX512BW__)
  constexpr int order = _MM_SHUFFLE(3, 1, 2, 0);
  __m256i words = _mm512_cvtepi32_epi16((__m512i)value);
  words = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, order), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  constexpr int order = _MM_SHUFFLE(3, 1, 2, 0);
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
  words = _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, order), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
#endif
}

// Quantizes a row, padded to `padded`; the scale becomes NaN where the row holds NaN.
template <typename T>
inline void quantize_row(const T* x, int64_t n, int64_t padded, Quantization& quantization, Element* to) {
  const Vec low = splat(-quantization.zero), high = splat(kLargestByte - quantization.zero);
  Mask has_nan{};
  auto quantized_values = [&](Vec given) {
    Vec value = given * quantization.inverse;
    has_nan |= is_nan(value);
    value = minimum(maximum(value, low), high);  // before rounding: the bounds are integers
    return nearest(value) + quantization.zero;
  };
  int64_t whole = n / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) store_elements(to + c, quantized_values(load(x + c)));
  if (whole < n) {  // padding is multiplied with weights of zero
    Element rest[kLanes];
    store_elements(rest, quantized_values(load_some(x + whole, n - whole)));
    std::copy(rest, rest + padded - whole, to + whole);
  }
  if (any(has_nan)) quantization.scale = kNaN;
}

// The same for activations with a sign.
inline void store_signed(uint8_t* to, IntVec value) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
#else
  store_elements(to, value);  // which keeps the low bits
#endif
}
inline void store_signed(int16_t* to, IntVec value) { store_elements(to, value); }

constexpr int64_t kGroup = 32;          // values of x that share a scale with granularity "group"
constexpr float kLargestSigned = 127.0f;

// Quantizes a group without a zero point; returns its scale, NaN where it holds NaN or an infinity. total: of the integers.
template <typename T>
inline float quantize_group(const T* x, Element* to, int32_t& total) {
  constexpr int kVectors = kGroup / kLanes;
  Vec values[kVectors], reach = splat(0.0f);
  Mask has_nan{};
  for (int v = 0; v < kVectors; ++v) {
    values[v] = load(x + v * kLanes);
    has_nan |= is_nan(values[v]);
    reach = maximum(maximum(values[v], -values[v]), reach);
  }
  float scale = std::max(largest(reach) / kLargestSigned, kLeastScale);
  bool finite = !any(has_nan) && std::isfinite(scale);
  float inverse = finite ? 1.0f / scale : 0.0f;
  IntVec sums{};
  for (int v = 0; v < kVectors; ++v) {
    IntVec q = finite ? nearest(values[v] * inverse) : IntVec{};
    store_signed(to + v * kLanes, q);
    sums += q;
  }
  total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return finite ? scale : kNaN;
}

enum class Granularity { kToken, kTensor, kStatic, kRows, kGroup };

// tiled: whether products go by tiles.
template <typename T, bool tiled>
struct Quantized {
  static constexpr bool kSharesRows = true;
  static constexpr int64_t kProductRows = tiled ? kAmxRows : 0, kFewRows = 0;
  using Scope = AmxScope;
  const T* x;             // [rows, inputs]
  const int8_t* weight;   // packed, [panels, padded / 4, kPanel, 4]
  const float* scale;     // per output feature, padded to whole panels
  const int32_t* sums;    // of the weights of each feature, likewise
  int64_t rows, inputs, padded;
  Granularity granularity;
  Quantization quantization;              // of all rows, with kTensor and kStatic
  const float *row_scale = nullptr, *row_zero = nullptr;  // of each row, with kRows; row_zero is null without zero points
  int64_t origin = 0;     // the first row of `elements` and `quantizations`
  std::vector<Element> elements{};
  std::vector<Quantization> quantizations{};

  int64_t row_bytes() const { return padded * sizeof(Element); }
  // Of a row of `elements`; what is beyond `padded` is multiplied with zeros.
  int64_t width() const { return tiled ? ceil_div(padded, kTileBytes) * kTileBytes : padded; }

  auto open(int64_t panel, int64_t) const {
    const int8_t* from = weight + panel * padded * kPanel;
    if constexpr (tiled) {
      thread_local std::vector<char> rest;
      return amx_panel(from, padded / 4, rest);
    } else {
      return from;
    }
  }

  // Finds the per-tensor scale of x.
  void measure() {
    if (granularity != Granularity::kTensor) return;
    int64_t step = std::max<int64_t>(1, kQuantizationGrain / std::max<int64_t>(inputs, 1)), pieces = ceil_div(rows, step);
    std::vector<Range> ranges(pieces);
    at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
      for (int64_t piece = from; piece < to; ++piece)
        ranges[piece].template take<true>(x + piece * step * inputs, std::min(step, rows - piece * step) * inputs);
    });
    Range whole;
    for (const Range& found : ranges) {
      whole.low = minimum(whole.low, found.low), whole.high = maximum(whole.high, found.high);
      whole.has_nan |= found.has_nan;
    }
    quantization = whole.quantization();
  }

  void prepare(int64_t begin, int64_t end) {
    origin = begin;
    elements.resize((tiled ? ceil_div(end - begin, kTileRows) * kTileRows : end - begin) * width());
    quantizations.resize(end - begin);
    int64_t grain = std::max<int64_t>(1, kQuantizationGrain / std::max<int64_t>(inputs, 1));
    at::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        quantizations[row - begin] = quantize(row, elements.data() + (row - begin) * width());
    });
  }

  // Quantizes a row into `to`, [padded].
  Quantization quantize(int64_t row, Element* to) const {
    Quantization found = quantization;
    if (granularity == Granularity::kToken) {
      Range range;
      range.template take<false>(x + row * inputs, inputs);
      found = range.quantization();
    } else if (granularity == Granularity::kRows) {
      found = known_quantization(row_scale[row], row_zero ? row_zero[row] : 0.0f);
    }
    quantize_row(x + row * inputs, inputs, padded, found, to);
    return found;
  }

  template <int R, bool fetches>
  void tile(const int8_t* opened, int64_t row, int64_t panel, int column, Vec (&values)[R][kWide], bool once) const {
    IntVec totals[R][kWide] = {};
    const int8_t* columns = opened + column * kPair<int8_t>;
    multiply<R, fetches>(elements.data() + (row - origin) * padded, padded, columns, padded / kPair<int8_t>, totals, once);
    dequantize(row, panel, column, totals, values);
  }

  // The products of R rows and a chunk of the panel's columns from their sums.
  template <int R>
  void dequantize(int64_t row, int64_t panel, int column, const IntVec (&totals)[R][kWide], Vec (&values)[R][kWide]) const {
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      Dequantizer column_of(*this, panel * kPanel + column + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) values[r][v] = column_of(totals[r][v], quantizations[row - origin + r]);
    }
  }

  // Rows [row, row + rows) times the panel, at most kAmxRows, into `values`, [kAmxRows, kPanel].
  void product(const AmxPanel& opened, int64_t row, int64_t rows, int64_t panel, float* values) const {
    amx_product<uint8_t>(rows, elements.data() + (row - origin) * width(), width(), opened, values, kPanelBytes);
    dequantize(row, rows, panel, values);
  }

  // The same of sums in the place of `values`, [rows, kPanel].
  void dequantize(int64_t row, int64_t rows, int64_t panel, float* values) const {
    for (int column = 0; column < kPanel; column += kLanes) {
      Dequantizer column_of(*this, panel * kPanel + column);
      for (int64_t r = 0; r < rows; ++r) {
        IntVec total;
        std::memcpy(&total, values + r * kPanel + column, sizeof total);
        store(values + r * kPanel + column, column_of(total, quantizations[row - origin + r]));
      }
    }
  }

 private:
  // The products of a vector of columns from their sums.
  struct Dequantizer {
    Vec factor;
    IntVec ones;

    Dequantizer(const Quantized& source, int64_t c) : factor(load(source.scale + c)) {
      std::memcpy(&ones, source.sums + c, sizeof ones);
    }

    Vec operator()(IntVec total, const Quantization& row) const {
      Vec whole = to_floats((IntVec)((BitVec)total - (BitVec)ones * uint32_t(row.zero)));  // overflow wraps around
      return whole * (factor * row.scale);
    }
  };
};

constexpr uint8_t kInt4Middle = 8, kInt8Middle = 128;  // added to elements that are multiplied without a sign

// A weight of 8 or 4 bits with a scale for each group of inputs, and x by tokens:
//   x W^T  =  scale_x (sum_g scale_w[g] sum_i q_i w_i - zero_x sum_g scale_w[g] sum_i w_i)
// or, by_group, x with a scale for each kGroup inputs and no zero point; the weight may then have one scale for each feature:
//   x W^T  =  sum_g scale_x[g] scale_w[g] sum_i q_i w_i
// or, shifts, so with zero points of four-bit weights too, which are then stored without a sign:
//   x W^T  =  sum_g scale_x[g] scale_w[g] (sum_i q_i w_i - zero_w[g] sum_i q_i)
template <typename T, int bits, bool by_group, bool shifts>
struct GroupQuantized : Quantized<T, false> {
  using Base = Quantized<T, false>;
  static constexpr int64_t kStepBytes = kPanel * 4 * bits / 8;  // of four inputs of a panel; of four bits columns c and c + 16
                                                                // share a byte
  static constexpr int32_t kMiddle = shifts ? 1 : bits == 4 ? kInt4Middle : by_group && kRaises ? kInt8Middle : 0;
  const void* group_scale;   // [panels, groups, kPanel], float16 or float32
  bool half;
  const float* weighted;     // sum_g scale_w[g] sum_i w_i, [columns]; unused by_group
  int64_t groups;
  const uint8_t* zero_point;       // as group_scale; null unless it shifts
  std::vector<std::conditional_t<shifts, float, int32_t>> middles{};  // kMiddle sum_i q_i of each row and part, [rows, parts]
  std::vector<float> scales{};     // of x, by_group, likewise

  // The pieces of a row whose sums are dequantized by themselves.
  int64_t parts() const { return by_group ? this->inputs / kGroup : groups; }

  void prepare(int64_t begin, int64_t end) {
    const int64_t inputs = this->inputs, count = parts(), length = inputs / std::max<int64_t>(count, 1);
    if constexpr (kMiddle != 0) middles.resize((end - begin) * count);
    if constexpr (!by_group) {
      Base::prepare(begin, end);
      for (size_t i = 0; i < middles.size(); ++i) {
        const Element* from = this->elements.data() + i * length;
        middles[i] = kMiddle * std::accumulate(from, from + length, int32_t{0});
      }
    } else {
      this->origin = begin;
      // Tiles read 16 rows, of which the last may be beyond the end.
      this->elements.resize(ceil_div(end - begin, kTileRows) * kTileRows * inputs), scales.resize((end - begin) * count);
      int64_t grain = std::max<int64_t>(1, kQuantizationGrain / kGroup);
      at::parallel_for(0, (end - begin) * count, grain, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          int32_t total;
          scales[i] = quantize_group(this->x + begin * inputs + i * kGroup, this->elements.data() + i * kGroup, total);
          if constexpr (kMiddle != 0) middles[i] = kMiddle * total;
        }
      });
    }
  }

  const int8_t* open(int64_t panel, int64_t) const { return this->weight + panel * (this->inputs / 4) * kStepBytes; }

  template <int R, bool fetches>
  void tile(const int8_t* opened, int64_t row, int64_t panel, int column, Vec (&values)[R][kWide], bool) const {
    const int64_t inputs = this->inputs, count = parts(), first = row - this->origin, c = panel * kPanel + column;
    const int64_t steps = inputs / std::max<int64_t>(count, 1) / 4, share = count / groups;
    const Element* rows = this->elements.data() + first * inputs;
    for (int64_t part = 0; part < count; ++part, rows += steps * 4) {
      IntVec totals[R][kWide] = {};
      for (int64_t step = 0; step < steps; ++step, opened += kStepBytes) {
        __builtin_prefetch(opened + kAhead, 0, 2);
        ByteVec found[kWide];
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) found[v] = bytes(opened, column + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kWide; ++v) {
            const Element* four = rows + r * inputs + step * 4;
            if constexpr (by_group) totals[r][v] = signed_product(four, found[v], totals[r][v]);
            else totals[r][v] = lissom::product(four, found[v], totals[r][v]);
          }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        const int64_t group = place_of(part / share, groups, c + v * kLanes);
        Vec scale = load_floats(group_scale, half, group), zero{};
        if constexpr (shifts) zero = load(zero_point + group);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int64_t place = (first + r) * count + part;
          if constexpr (kMiddle != 0 && !shifts) totals[r][v] -= middles[place];
          Vec factor = scale, total = to_floats(totals[r][v]);
          if constexpr (by_group) factor *= scales[place];
          if constexpr (shifts) total = multiply_add(-zero, splat(middles[place]), total);
          values[r][v] = multiply_add(total, factor, values[r][v]);
        }
      }
    }
    if constexpr (by_group) return;
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      Vec ones = load(weighted + c + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Quantization& mine = this->quantizations[first + r];
        values[r][v] = (values[r][v] - ones * static_cast<float>(mine.zero)) * mine.scale;
      }
    }
  }

 private:
  // The elements of four inputs and kLanes columns from `column` on, plus kMiddle unless it shifts.
  static ByteVec bytes(const int8_t* from, int column) {
    ByteVec found = load_bytes(from + column % (kPanel * bits / 8) * 4);
    if constexpr (bits == 8 && kMiddle == 0) return found;
    if constexpr (bits == 8) return (ByteVec)((BitVec)found ^ kInt8Middle * 0x01010101u);
    BitVec low = column < kPanel / 2 ? (BitVec)found : (BitVec)found >> 4;
    return (ByteVec)((low & 0x0f0f0f0fu) ^ (shifts ? 0 : kInt4Middle * 0x01010101u));
  }
};

}  // namespace lissom
