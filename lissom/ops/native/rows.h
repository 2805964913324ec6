// Row-wise kernels: layer norm, RMS norm and rotary position embedding.
#pragma once

#include "attention.h"

#include <cmath>

namespace lissom {

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread costs more than it saves

// (x - mean) / sqrt(variance + eps) * weight + bias for a row of n numbers, with two-pass statistics as in PyTorch. Either of weight
// and bias may be null. Without `centers` the mean is taken for 0: RMS norm.
template <typename T, bool centers = true>
struct RowNorm {
  const T *weight, *bias;
  int64_t n;
  float eps;

  template <typename Source>
  void operator()(const Source* from, T* to) const {
    float mean = 0;
    if constexpr (centers) {
      Vec total = splat(0.0f);
      for (int64_t c = 0; c < n; c += kLanes) total += load_some(from + c, n - c);
      mean = sum(total) / n;
    }
    Vec squares = splat(0.0f);
    for (int64_t c = 0; c < n; c += kLanes) {
      Vec value = load_some(from + c, n - c);
      if constexpr (centers) value = first_lanes(value - mean, n - c);
      squares += value * value;
    }
    float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
    for (int64_t c = 0; c < n; c += kLanes) {
      Vec value = load_some(from + c, n - c);
      if constexpr (centers) value -= mean;
      value *= scale;
      if (weight) value *= load_some(weight + c, n - c);
      if (bias) value += load_some(bias + c, n - c);
      store_some(to + c, value, n - c);
    }
  }
};

template <typename T, bool centers>
void run(const RowNorm<T, centers>& norm, const T* x, T* y, int64_t rows) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / norm.n), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) norm(x + row * norm.n, y + row * norm.n);
  });
}

template <typename T>
struct Rotary {
  // x: [batch, heads, tokens, head_dim]; cos, sin: the same, or half as many features. Columns are adjacent.
  const T *x, *cos, *sin;
  T* y;
  Strides x_strides, cos_strides, sin_strides, y_strides;
  int64_t batch, heads, tokens, head_dim, angles;
  bool interleaved;
};

template <typename T>
inline void rotate(const Rotary<T>& call, const T* x, const T* cos, const T* sin, T* y) {
  int64_t half = call.head_dim / 2;
  bool full = call.angles == call.head_dim;
  if (call.interleaved) {
    auto turn = [&](int64_t c, Vec cosine, Vec sine) {
      Vec value = load_some(x + c, call.head_dim - c);
      store_some(y + c, value * cosine + quarter_turn(value) * sine, call.head_dim - c);
    };
    for (int64_t c = 0; c < call.angles; c += kLanes) {
      Vec cosine = load_some(cos + c, call.angles - c), sine = load_some(sin + c, call.angles - c);
      if (full) {
        turn(c, cosine, sine);
      } else {
        turn(2 * c, each_twice<0>(cosine), each_twice<0>(sine));
        if (c + kLanes / 2 < half) turn(2 * c + kLanes, each_twice<1>(cosine), each_twice<1>(sine));
      }
    }
    return;
  }
  int64_t other = full ? half : 0;
  for (int64_t c = 0; c < half; c += kLanes) {
    int64_t left = half - c;
    Vec a = load_some(x + c, left), b = load_some(x + half + c, left);
    store_some(y + c, a * load_some(cos + c, left) - b * load_some(sin + c, left), left);
    store_some(y + half + c, b * load_some(cos + other + c, left) + a * load_some(sin + other + c, left), left);
  }
}

template <typename T>
void run(const Rotary<T>& call) {
  int64_t rows = call.batch * call.tokens, most = std::max<int64_t>(1, kGrain / (call.heads * call.head_dim));
  at::parallel_for(0, rows, most, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      int64_t t = row % call.tokens, b = row / call.tokens;
      for (int64_t h = 0; h < call.heads; ++h)
        rotate(call, call.x + call.x_strides.at(b, h, t), call.cos + call.cos_strides.at(b, h, t),
               call.sin + call.sin_strides.at(b, h, t), call.y + call.y_strides.at(b, h, t));
    }
  });
}

}  // namespace lissom
