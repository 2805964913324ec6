// Quantization followed by dequantization in one pass over x, and its gradients: lissom/ops/quantization.py has the formulas.
#pragma once

#include "quantized.h"

#include <torch/headeronly/util/Float8_e4m3fn.h>

namespace lissom {

constexpr float kLargestFp4 = 6.0f;
constexpr float kLargestInverse = 0x1p126f;  // of a scale, also of 2^-127

// A low-precision format: the range of q, and whether q is an integer; else it is fp8, or fp4 where it ends at kLargestFp4.
struct Grid {
  float low, high;
  bool is_integer = true, symmetric = true;
};

// The blocks of x, [rows, columns], that share a scale. A row has `groups` of them, or one number per column.
struct Blocks {
  const float *scale, *zero_point;          // zero_point: null where it is 0
  int64_t rows, columns, groups;
  std::vector<int64_t> sizes{}, heights{};  // of the dimensions before the last: of x, and how many indices share a scale
  float tensor_scale = 1.0f;                // multiplied with every scale

  bool per_column() const { return groups == columns && columns > 1; }

  // Where the scales of a row start.
  int64_t start(int64_t row) const {
    int64_t found = 0, step = groups;
    for (size_t dim = sizes.size(); dim-- > 0; row /= sizes[dim], step *= sizes[dim] / heights[dim])
      found += row % sizes[dim] / heights[dim] * step;
    return found;
  }
};

inline Vec round_to_fp8(Vec value) {
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = static_cast<float>(c10::Float8_e4m3fn(value[lane]));
  return value;
}

// Ties go to the even code: the steps are 0.5 below 2, 1 below 4, and 2 up to 6.
inline Vec round_to_fp4(Vec value) {
  Vec size = (Vec)((BitVec)value & 0x7fffffff), two = splat(2.0f), one = splat(1.0f);
  Vec step = size < two ? splat(0.5f) : size < splat(4.0f) ? one : two;
  return rounded(value / step) * step;
}

// How a vector of x is quantized: scale, zero_point and the inverse of the scale, per lane.
template <bool is_integer>
struct Quantizer {
  Vec scale, zero, low, high, inverse = 1.0f / scale;

  // q; NaN stays NaN.
  Vec level(Vec x) const {
    Vec q = x * inverse;
    if constexpr (is_integer) q = rounded(q) + zero;
    q = minimum(high, maximum(low, q));
    if constexpr (!is_integer) q = high[0] == kLargestFp4 ? round_to_fp4(q) : round_to_fp8(q);
    return q;
  }
  Vec rounded_value(Vec x) const { return (level(x) - zero) * scale; }
  IntVec is_inside(Vec x) const {
    Vec first = (low - zero) * scale, last = (high - zero) * scale;
    return (x >= minimum(first, last)) & (x <= maximum(first, last));
  }
};

// work(first, count, scale) runs for each block of a row; scale: the index of its scale.
template <typename Work>
inline void each_block(const Blocks& blocks, int64_t row, Work&& work) {
  int64_t start = blocks.start(row), width = blocks.per_column() ? blocks.columns : blocks.columns / blocks.groups;
  for (int64_t c = 0; c < blocks.columns; c += width) work(row * blocks.columns + c, width, start + c / width);
}

// work(c, left, quantizer) runs for each vector of a block of `count` elements; left: of them, from c on.
template <bool is_integer, typename Work>
inline void each_vector(const Blocks& blocks, const Grid& grid, int64_t count, int64_t scale, Work&& work) {
  auto quantizer = [&](int64_t c) {
    auto values = [&](const float* from) {
      return blocks.per_column() ? load_some(from + scale + c, count - c) : splat(from[scale]);
    };
    Vec zero = blocks.zero_point ? values(blocks.zero_point) : splat(0.0f);
    Vec scale = values(blocks.scale), whole = splat(blocks.tensor_scale);
    Vec inverse = minimum(splat(kLargestInverse), (1.0f / whole) / scale);
    return Quantizer<is_integer>{scale * whole, zero, splat(grid.low), splat(grid.high), inverse};
  };
  auto shared = quantizer(0);
  for (int64_t c = 0; c < count; c += kLanes) {
    if (blocks.per_column()) shared = quantizer(c);
    work(c, count - c, shared);
  }
}

inline int64_t grain_of(const Blocks& blocks) { return std::max<int64_t>(1, kQuantizationGrain / blocks.columns); }

template <bool is_integer, typename T>
void fake_quantize(const Blocks& blocks, const Grid& grid, const T* x, T* y) {
  at::parallel_for(0, blocks.rows, grain_of(blocks), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row)
      each_block(blocks, row, [&](int64_t first, int64_t count, int64_t scale) {
        each_vector<is_integer>(blocks, grid, count, scale, [&](int64_t c, int64_t left, const auto& quantizer) {
          store_some(y + first + c, quantizer.rounded_value(load_some(x + first + c, left)), left);
        });
      });
  });
}

// q as bytes; `halves`: two elements of four bits in each, the first in the low half.
template <typename T>
void quantize(const Blocks& blocks, const Grid& grid, bool halves, const T* x, uint8_t* q) {
  at::parallel_for(0, blocks.rows, grain_of(blocks), [&](int64_t from, int64_t to) {
    std::vector<float> held(blocks.columns);
    for (int64_t row = from; row < to; ++row) {
      int64_t begin = row * blocks.columns;
      each_block(blocks, row, [&](int64_t first, int64_t count, int64_t scale) {
        each_vector<true>(blocks, grid, count, scale, [&](int64_t c, int64_t left, const auto& quantizer) {
          Vec level = quantizer.level(load_some(x + first + c, left));
          store_some(&held[first - begin + c], level == level ? level : splat(0.0f), left);
        });
      });
      uint8_t* place = q + (halves ? begin / 2 : begin);
      if (halves)
        for (int64_t c = 0; c < blocks.columns / 2; ++c)
          place[c] = (static_cast<int>(held[2 * c]) & 15) | (static_cast<int>(held[2 * c + 1]) & 15) << 4;
      else
        for (int64_t c = 0; c < blocks.columns; ++c) place[c] = static_cast<uint8_t>(static_cast<int>(held[c]));
    }
  });
}

// The scale and zero point for a range, in the order of formats.scale_for; NaN where it is not finite.
inline std::pair<float, float> scale_for(float low, float high, const Grid& grid) {
  low = std::min(low, 0.0f), high = std::max(high, 0.0f);
  float scale = grid.symmetric ? std::max(-low, high) / grid.high : (high - low) / (grid.high - grid.low), zero = 0;
  if (!std::isfinite(scale)) return {kNaN, 0.0f};
  scale = std::max(scale, kLeastScale);
  if (!grid.symmetric) zero = std::min(std::max(std::nearbyint(grid.low - low / scale), grid.low), grid.high);
  return {scale, zero};
}

// The scale and zero point of each block of `width` neighbours by which its squared error is least, among the ranges that are
// the block's own times one of the factors; the first of equals. A vector holds a number of each of several blocks.
// descending: the scale's sign is that of the smaller end, as the lowest q of a symmetric format reaches further.
template <typename T>
void search_scales(const Grid& grid, bool descending, int64_t blocks, int64_t width, const T* x, const std::vector<float>& factors,
                   float* scales, float* zeros) {
  at::parallel_for(0, (blocks + kLanes - 1) / kLanes, 1 + kQuantizationGrain / (width * kLanes + 1), [&](int64_t from, int64_t to) {
    std::vector<float> held(width * kLanes);
    Vec none = splat(0.0f), lowest = splat(grid.low), highest = splat(grid.high), levels = splat(grid.high - grid.low);
    for (int64_t first = from * kLanes; first < std::min(to * kLanes, blocks); first += kLanes) {
      int64_t count = std::min<int64_t>(kLanes, blocks - first);
      for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t c = 0; c < width; ++c) held[c * kLanes + lane] = static_cast<float>(x[(first + lane) * width + c]);
      Vec low = none, high = none, odd = none;
      for (int64_t c = 0; c < width; ++c) {
        Vec value = load(&held[c * kLanes]);
        low = minimum(low, value), high = maximum(high, value), odd += value * none;  // NaN where a value is not finite
      }
      Vec sign = splat(1.0f), scale = none, zero = none, least = none;
      if (descending) sign = high > -low ? splat(-1.0f) : sign;
      for (size_t index = 0; index < factors.size(); ++index) {
        Vec narrow_low = low * splat(factors[index]), narrow_high = high * splat(factors[index]), offset = none;
        Vec step = grid.symmetric ? maximum(-narrow_low, narrow_high) / highest : (narrow_high - narrow_low) / levels;
        step = maximum(step, splat(kLeastScale));
        if (!grid.symmetric) offset = minimum(highest, maximum(lowest, rounded(lowest - narrow_low / step)));
        Quantizer<true> quantizer{step * sign, offset, lowest, highest};
        Vec error = none;
        for (int64_t c = 0; c < width; ++c) {
          Vec value = load(&held[c * kLanes]), difference = quantizer.rounded_value(value) - value;
          error += difference * difference;
        }
        IntVec better = index == 0 ? IntVec{} == 0 : error < least;
        least = better ? error : least, scale = better ? quantizer.scale : scale, zero = better ? offset : zero;
      }
      store_some(scales + first, scale + odd, count), store_some(zeros + first, zero, count);
    }
  });
}

// Every row with the scale of its own values.
template <bool is_integer, typename T>
void fake_quantize_rows(const Grid& grid, int64_t rows, int64_t columns, const T* x, T* y) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kQuantizationGrain / columns), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      Range range;
      range.take<true>(x + row * columns, columns);
      auto [scale, zero] = scale_for(any(range.has_nan) ? kNaN : smallest(range.low), largest(range.high), grid);
      Quantizer<is_integer> quantizer{splat(scale), splat(zero), splat(grid.low), splat(grid.high)};
      for (int64_t c = row * columns, end = c + columns; c < end; c += kLanes)
        store_some(y + c, quantizer.rounded_value(load_some(x + c, end - c)), end - c);
    }
  });
}

// The gradient of x, and of the scales of each row where `changes` is not null: [rows, groups].
template <bool is_integer, typename T>
void fake_quantize_backward(const Blocks& blocks, const Grid& grid, const T* gradient, const T* x, T* x_gradient, float* changes) {
  at::parallel_for(0, blocks.rows, grain_of(blocks), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      float* change = changes ? changes + row * blocks.groups : nullptr;
      each_block(blocks, row, [&](int64_t first, int64_t count, int64_t scale) {
        Vec total = splat(0.0f);
        each_vector<is_integer>(blocks, grid, count, scale, [&](int64_t c, int64_t left, const auto& quantizer) {
          Vec g = load_some(gradient + first + c, left), value = load_some(x + first + c, left), none = splat(0.0f);
          IntVec inside = quantizer.is_inside(value);
          store_some(x_gradient + first + c, inside ? g : none, left);
          if (!change) return;
          Vec found = g * (quantizer.rounded_value(value) - (inside ? value : none));
          if (blocks.per_column()) store_some(change + c, found * splat(blocks.tensor_scale) / quantizer.scale, left);
          else total += found;
        });
        if (change && !blocks.per_column()) *change++ = sum(total) / blocks.scale[scale];
      });
    }
  });
}

}  // namespace lissom
