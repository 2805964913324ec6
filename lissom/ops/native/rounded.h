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

#if defined(__AVX512VNNI__)

struct Range {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 spoilt = 0;

  // A row that is rounded next need not be looked through for NaN here.
  template <bool finds_spoilt, typename T>
  void take(const T* x, int64_t n) {
    for (int64_t c = 0; c < n; c += kLanes) {
      __m512 value = (__m512)load_some(x + c, n - c);
      low = _mm512_min_ps(low, value);
      high = _mm512_max_ps(high, value);
      if (finds_spoilt) spoilt |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
  }

  Grid grid() const {
    Grid found = grid_for(_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high));
    return spoilt || !std::isfinite(found.scale) ? Grid{kNoNumber, 0.0f, 0} : found;
  }
};

// A row's bytes; the scale of one that holds NaN becomes NaN.
template <typename T>
inline void round_row(const T* x, int64_t n, int64_t padded, Grid& grid, uint8_t* to) {
  const __m512 inverse = _mm512_set1_ps(grid.inverse);
  const __m512 low = _mm512_set1_ps(-grid.zero), high = _mm512_set1_ps(kLargestByte - grid.zero);
  const __m512i zero = _mm512_set1_epi32(grid.zero);
  __mmask16 spoilt = 0;
  auto bytes = [&](Vec given) {
    __m512 value = _mm512_mul_ps((__m512)given, inverse);
    spoilt |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    value = _mm512_min_ps(_mm512_max_ps(value, low), high);  // before it is rounded: the ends are whole
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(value), zero));
  };
  int64_t whole = n / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), bytes(load(x + c)));
  if (whole < n) {
    uint8_t rest[kLanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), bytes(load_some(x + whole, n - whole)));
    std::copy(rest, rest + n - whole, to + whole);
  }
  std::fill(to + n, to + padded, 0);
  if (spoilt) grid.scale = kNoNumber;
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
  std::vector<uint8_t> bytes{};
  std::vector<Grid> grids{};

  int64_t row_bytes() const { return padded; }
  const int8_t* open(int64_t panel, int64_t) const { return weight + panel * padded * kPanel; }

  // Finds the grid of the whole of x.
  void measure() {
    if (rounding != Rounding::kTensor) return;
    int64_t step = std::max<int64_t>(1, kBytesGrain / inputs), pieces = ceil_div(rows, step);
    std::vector<Range> ranges(pieces);
    at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
      for (int64_t piece = from; piece < to; ++piece)
        ranges[piece].template take<true>(x + piece * step * inputs, std::min(step, rows - piece * step) * inputs);
    });
    Range whole;
    for (const Range& found : ranges) {
      whole.low = _mm512_min_ps(whole.low, found.low), whole.high = _mm512_max_ps(whole.high, found.high);
      whole.spoilt |= found.spoilt;
    }
    grid = whole.grid();
  }

  void prepare(int64_t begin, int64_t end) {
    origin = begin;
    bytes.resize((end - begin) * padded);
    grids.resize(end - begin);
    at::parallel_for(begin, end, std::max<int64_t>(1, kBytesGrain / inputs), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        Grid& mine = grids[row - begin];
        if (rounding == Rounding::kToken) {
          Range range;
          range.template take<false>(x + row * inputs, inputs);
          mine = range.grid();
        } else {
          mine = grid;
        }
        round_row(x + row * inputs, inputs, padded, mine, bytes.data() + (row - begin) * padded);
      }
    });
  }

  template <int R, bool fetches>
  void tile(const int8_t* opened, int64_t row, int64_t panel, int column, Vec (&values)[R][kWide]) const {
    IntVec totals[R][kWide] = {};
    const int8_t* columns = opened + column * kPair<int8_t>;
    multiply<R, fetches>(bytes.data() + (row - origin) * padded, padded, columns, padded / kPair<int8_t>, totals);
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      int64_t c = panel * kPanel + column + v * kLanes;
      Vec factor = load(scale + c);
      IntVec ones;
      std::memcpy(&ones, sums + c, sizeof ones);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Grid& mine = grids[row - origin + r];
        Vec whole = __builtin_convertvector(totals[r][v] - ones * mine.zero, Vec);
        values[r][v] = whole * (factor * mine.scale);
      }
    }
  }
};

#endif

}  // namespace lissom
