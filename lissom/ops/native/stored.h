// The product of floats with a weight stored in eight or four bits, in groups with a scale each: w is about (q - zero) scale.
//
// A few rows read the integers once, and turn them into floats in registers: they are waiting for memory anyway. For more rows a
// panel is turned into floats first, as a packed weight holds them.
#pragma once

#include "tile.h"

#include <vector>

namespace lissom {

#if defined(__AVX512BW__)

constexpr bool kHasStored = true;
constexpr int kFew = 4;  // rows up to which the integers are read by each

struct StoredWeight {
  const uint8_t* q;      // [panels, inputs, kPanel] bytes, or [.., kPanel / 2]: columns c and c + 16 share one
  bool four_bits, is_signed;
  const void* scale;     // [groups, columns], float16 or float32
  bool half;
  const uint8_t* zero;   // [groups, columns], or null
  int64_t inputs, groups, columns;

  int64_t panel_bytes() const { return inputs * (four_bits ? kPanel / 2 : kPanel); }

  Vec scales(int64_t group, int64_t column) const {
    int64_t place = group * columns + column;
    if (!half) return load(static_cast<const float*>(scale) + place);
    const uint16_t* from = static_cast<const uint16_t*>(scale) + place;
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  Vec zeros(int64_t group, int64_t column) const {
    const uint8_t* from = zero + group * columns + column;
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
};

// The two vectors of a panel's row of weights as floats, before zero point and scale.
template <bool four_bits>
struct Decoder {
  bool is_signed;
  __m512 table;

  explicit Decoder(bool is_signed) : is_signed(is_signed) {
    alignas(64) float values[16];
    for (int i = 0; i < 16; ++i) values[i] = is_signed && i > 7 ? i - 16 : i;
    table = _mm512_load_ps(values);
  }

  inline __attribute__((always_inline)) void operator()(const uint8_t* from, Vec (&to)[kWide]) const {
    auto bytes = [](const uint8_t* place) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(place)); };
    if constexpr (four_bits) {
      __m512i both = _mm512_cvtepu8_epi32(bytes(from));  // a table's place is the lowest four bits
      to[0] = (Vec)_mm512_permutexvar_ps(both, table);
      to[1] = (Vec)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
    } else {
      for (int v = 0; v < kWide; ++v) {
        __m128i half = bytes(from + v * kLanes);
        to[v] = (Vec)_mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(half) : _mm512_cvtepu8_epi32(half));
      }
    }
  }
};

// Two rows of weights as pairs, the way a packed weight of bfloat16 holds them.
#if defined(__AVX512BF16__)
inline void store_pairs(BFloat16* to, Vec first, Vec second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), pairs));
}
#else
inline void store_pairs(BFloat16*, Vec, Vec) {}  // never called
#endif

template <typename T>
struct Stored {
  const T* x;  // [rows, inputs]
  StoredWeight weight;
  int64_t rows;
  std::vector<float> floats{};  // x, where the integers are read by each row
  std::vector<float> sums{};    // of x in each group, [rows, groups]

  bool direct() const { return rows <= kFew; }
  int64_t row_bytes() const { return weight.inputs * sizeof(T); }

  void prepare(int64_t begin, int64_t end) {
    if (!direct()) return;
    int64_t n = weight.inputs, group = n / weight.groups;
    floats.resize(rows * n);
    for (int64_t i = begin * n; i < end * n; i += kLanes)
      store_some(floats.data() + i, load_some(x + i, end * n - i), end * n - i);
    if (!weight.zero) return;
    sums.assign(rows * weight.groups, 0.0f);
    for (int64_t i = begin * n; i < end * n; ++i) sums[i / group] += floats[i];
  }

  // The panel in floats, in memory of this thread's; null where the integers are read instead.
  const T* open(int64_t panel, int64_t) const {
    if (direct()) return nullptr;
    thread_local std::vector<T> floats_of_panel;
    floats_of_panel.resize(weight.inputs * kPanel);
    if (weight.four_bits) decode<true>(panel, floats_of_panel.data());
    else decode<false>(panel, floats_of_panel.data());
    return floats_of_panel.data();
  }

  template <int R, bool fetches>
  void tile(const T* opened, int64_t row, int64_t panel, int column, Vec (&values)[R][kWide]) const {
    constexpr int pair = kPair<T>;
    if constexpr (R <= kFew) {
      if (!opened) return weight.four_bits ? direct_tile<true>(row, panel, values) : direct_tile<false>(row, panel, values);
    }
    multiply<R>(x + row * weight.inputs, weight.inputs, opened + column * pair, weight.inputs / pair, values);
  }

 private:
  template <bool four_bits>
  void decode(int64_t panel, T* to) const {
    constexpr int pair = kPair<T>;
    constexpr int64_t step = four_bits ? kPanel / 2 : kPanel;
    int64_t group = weight.inputs / weight.groups;
    const uint8_t* from = weight.q + panel * weight.panel_bytes();
    Decoder<four_bits> decoder(weight.is_signed);
    Vec scales[kWide], zeros[kWide] = {}, rows_of_weights[pair][kWide];
    for (int64_t i = 0; i < weight.inputs; ++i, from += step) {
      if (i % group == 0) {
        for (int v = 0; v < kWide; ++v) {
          scales[v] = weight.scales(i / group, panel * kPanel + v * kLanes);
          if (weight.zero) zeros[v] = weight.zeros(i / group, panel * kPanel + v * kLanes);
        }
      }
      Vec(&found)[kWide] = rows_of_weights[i % pair];
      decoder(from, found);
      for (int v = 0; v < kWide; ++v) found[v] = (found[v] - zeros[v]) * scales[v];
      if constexpr (pair == 1) {
        for (int v = 0; v < kWide; ++v) store(to + i * kPanel + v * kLanes, found[v]);
      } else if (i % 2) {
        for (int v = 0; v < kWide; ++v)
          store_pairs(to + (i - 1) * kPanel + v * 2 * kLanes, rows_of_weights[0][v], rows_of_weights[1][v]);
      }
    }
  }

  template <bool four_bits, int R>
  void direct_tile(int64_t row, int64_t panel, Vec (&totals)[R][kWide]) const {
    constexpr int64_t step = four_bits ? kPanel / 2 : kPanel;
    constexpr int chains = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums side by side, as one addition waits for the one before
    int64_t group = weight.inputs / weight.groups;
    const uint8_t* from = weight.q + panel * weight.panel_bytes();
    const char* coming = reinterpret_cast<const char*>(from + 4096);
    Decoder<four_bits> decoder(weight.is_signed);
    for (int64_t g = 0; g < weight.groups; ++g) {
      Vec partial[chains][R][kWide] = {};
      const float* values = floats.data() + row * weight.inputs + g * group;
      auto take = [&](int64_t i, Vec (&sums)[R][kWide]) {
        Vec found[kWide];
        decoder(from + i * step, found);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kWide; ++v) sums[r][v] += splat(values[r * weight.inputs + i]) * found[v];
      };
      int64_t i = 0;
      for (; i + chains <= group; i += chains) {
        __builtin_prefetch(coming + i * step, 0, 2);
#pragma GCC unroll 4
        for (int chain = 0; chain < chains; ++chain) take(i + chain, partial[chain]);
      }
      for (; i < group; ++i) take(i, partial[0]);
      from += group * step, coming += group * step;
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        int64_t column = panel * kPanel + v * kLanes;
        Vec scale = weight.scales(g, column);
        Vec zero = weight.zero ? weight.zeros(g, column) : splat(0.0f);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec sum = partial[0][r][v];
#pragma GCC unroll 4
          for (int chain = 1; chain < chains; ++chain) sum += partial[chain][r][v];
          if (weight.zero) sum -= zero * sums[(row + r) * weight.groups + g];
          totals[r][v] += sum * scale;
        }
      }
    }
  }
};

#else
constexpr bool kHasStored = false;
#endif

}  // namespace lissom
