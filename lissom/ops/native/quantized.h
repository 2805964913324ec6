// The product of values rounded to bytes with a weight of bytes: x is rounded row by row as lissom/compiler/grids.py does it,
// the sums are whole numbers, and become floats at the end.
//
//   x W^T  =  scale_x scale_w (sum_i q_i w_i - zero_x sum_i w_i)
#pragma once

#include "tile.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

namespace lissom {

constexpr float kLeastScale = 1e-30f;
constexpr float kLargestByte = 255.0f;
constexpr int64_t kMostByteInputs = 1 << 16;  // more products of bytes could leave the range of a sum of 32 bits
constexpr int64_t kBytesGrain = 1 << 14;  // values below which a second thread costs more than it does

// x is about (q - zero) * scale.
struct Grid {
  float scale, inverse;
  int32_t zero;
};

inline Grid grid_for(float low, float high) {
  float scale = std::max((high - low) / kLargestByte, kLeastScale);
  float zero = std::min(std::max(std::nearbyint(-low / scale), 0.0f), kLargestByte);
  return {scale, 1.0f / scale, static_cast<int32_t>(zero)};
}

// The scale by which a row is spoilt that holds no numbers, or too large ones.
constexpr float kNoNumber = std::numeric_limits<float>::quiet_NaN();

struct Range {
  Vec low = splat(0.0f), high = splat(0.0f);
  Mask spoilt{};

  // A row that is rounded next need not be looked through for NaN here.
  template <bool finds_spoilt, typename T>
  void take(const T* x, int64_t n) {
    for (int64_t c = 0; c < n; c += kLanes) {
      Vec value = load_some(x + c, n - c);
      low = minimum(low, value);
      high = maximum(high, value);
      if (finds_spoilt) spoilt |= is_nan(value);
    }
  }

  Grid grid() const {
    Grid found = grid_for(smallest(low), largest(high));
    return any(spoilt) || !std::isfinite(found.scale) ? Grid{kNoNumber, 0.0f, 0} : found;
  }
};

inline void store_whole(uint8_t* to, IntVec value) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)value));
#elif defined(__AVX2__)
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint8_t>(value[lane]);
#endif
}

// Four as 0, 2, 1, 3, the order of products of words.
inline void store_whole(int16_t* to, IntVec value) {
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

// A row in whole numbers, filled up to `padded`; the scale of one that holds NaN becomes NaN.
template <typename T>
inline void round_row(const T* x, int64_t n, int64_t padded, Grid& grid, Whole* to) {
  const Vec low = splat(-grid.zero), high = splat(kLargestByte - grid.zero);
  Mask spoilt{};
  auto whole_numbers = [&](Vec given) {
    Vec value = given * grid.inverse;
    spoilt |= is_nan(value);
    value = minimum(maximum(value, low), high);  // before it is rounded: the ends are whole
    return nearest(value) + grid.zero;
  };
  int64_t whole = n / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) store_whole(to + c, whole_numbers(load(x + c)));
  if (whole < n) {  // what a row is filled up with meets weights of zero
    Whole rest[kLanes];
    store_whole(rest, whole_numbers(load_some(x + whole, n - whole)));
    std::copy(rest, rest + padded - whole, to + whole);
  }
  if (any(spoilt)) grid.scale = kNoNumber;
}

enum class Rounding { kToken, kTensor, kKnown };

template <typename T>
struct Rounded {
  const T* x;             // [rows, inputs]
  const int8_t* weight;   // packed, [panels, padded / 4, kPanel, 4]
  const float* scale;     // of each feature, filled up to whole panels
  const int32_t* sums;    // of each feature's weights, likewise
  int64_t rows, inputs, padded;
  Rounding rounding;
  Grid grid;              // of all rows, unless the rounding is by token
  int64_t origin = 0;     // the row at which what follows begins
  std::vector<Whole> wholes{};
  std::vector<Grid> grids{};

  int64_t row_bytes() const { return padded * sizeof(Whole); }
  const int8_t* open(int64_t panel, int64_t) const { return weight + panel * padded * kPanel; }

  // Finds the grid of the whole of x.
  void measure() {
    if (rounding != Rounding::kTensor) return;
    int64_t step = std::max<int64_t>(1, kBytesGrain / std::max<int64_t>(inputs, 1)), pieces = ceil_div(rows, step);
    std::vector<Range> ranges(pieces);
    at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
      for (int64_t piece = from; piece < to; ++piece)
        ranges[piece].template take<true>(x + piece * step * inputs, std::min(step, rows - piece * step) * inputs);
    });
    Range whole;
    for (const Range& found : ranges) {
      whole.low = minimum(whole.low, found.low), whole.high = maximum(whole.high, found.high);
      whole.spoilt |= found.spoilt;
    }
    grid = whole.grid();
  }

  void prepare(int64_t begin, int64_t end) {
    origin = begin;
    wholes.resize((end - begin) * padded);
    grids.resize(end - begin);
    at::parallel_for(begin, end, std::max<int64_t>(1, kBytesGrain / std::max<int64_t>(inputs, 1)), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        Grid& mine = grids[row - begin];
        if (rounding == Rounding::kToken) {
          Range range;
          range.template take<false>(x + row * inputs, inputs);
          mine = range.grid();
        } else {
          mine = grid;
        }
        round_row(x + row * inputs, inputs, padded, mine, wholes.data() + (row - begin) * padded);
      }
    });
  }

  template <int R, bool fetches>
  void tile(const int8_t* opened, int64_t row, int64_t panel, int column, Vec (&values)[R][kWide]) const {
    IntVec totals[R][kWide] = {};
    const int8_t* columns = opened + column * kPair<int8_t>;
    multiply<R, fetches>(wholes.data() + (row - origin) * padded, padded, columns, padded / kPair<int8_t>, totals);
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      int64_t c = panel * kPanel + column + v * kLanes;
      Vec factor = load(scale + c);
      IntVec ones;
      std::memcpy(&ones, sums + c, sizeof ones);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Grid& mine = grids[row - origin + r];
        Vec whole = to_floats((IntVec)((BitVec)totals[r][v] - (BitVec)ones * uint32_t(mine.zero)));  // wrong sums wrap around
        values[r][v] = whole * (factor * mine.scale);
      }
    }
  }
};

}  // namespace lissom
