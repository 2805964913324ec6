// softmax(cap(q k^T scale) + bias) v, one head at a time: keys and values are packed once, a row of scores stays in cache.
#pragma once

#include "amx.h"
#include "visible_keys.h"

#include <cmath>
#include <vector>

namespace lissom {

struct Strides {
  int64_t batch, head, row, column;

  int64_t at(int64_t b, int64_t h, int64_t index) const { return b * batch + h * head + index * row; }
};

template <typename T, typename Cache = T>
struct Attention {
  const T* q;                // [batch, heads or key heads, tokens, head_dim]; q's columns are adjacent
  const Cache *k, *v;
  const float *k_scale, *v_scale;  // per-token scales of a quantized KV cache, [batch, key heads, tokens], or null
  Strides q_strides, k_strides, v_strides;
  const float* bias;         // added to the scores, or null
  const bool* mask;          // true for visible keys, or null
  Strides bias_strides;      // of either; 0 where it is broadcast
  const float* sinks;        // one logit per head, or null
  int64_t sink_batch, sink_head;
  T* y;                      // [batch, queries, heads, value_dim]
  int64_t batch, heads, key_heads, queries, keys, head_dim, value_dim;
  float scale, softcap;
  Band band;

  const T* query(int64_t b, int64_t h, int64_t row) const { return q + q_strides.at(b, h, row); }
  const Cache* key(int64_t b, int64_t group, int64_t token) const { return k + k_strides.at(b, group, token); }
  const Cache* value(int64_t b, int64_t group, int64_t token) const { return v + v_strides.at(b, group, token); }
  const float* sink(int64_t b, int64_t h) const { return sinks ? sinks + b * sink_batch + h * sink_head : nullptr; }
  T* output(int64_t b, int64_t h, int64_t row) const { return y + ((b * queries + row) * heads + h) * value_dim; }

  // Some queries of a call of one batch with a mask.
  Attention part(int64_t begin, int64_t end) const {
    Attention found(*this);
    found.q += begin * q_strides.row, found.mask += begin * bias_strides.row, found.y = output(0, 0, begin);
    found.queries = end - begin, found.band = band.after(begin);
    return found;
  }
};

// Packs the columns of a matrix into panels, padded with zeros: `inner` values on the reduction axis with stride `along`,
// `outer` columns with stride `across`; `padded` is the length of the reduction axis in the panels.
template <typename T, typename P>
inline void pack(const T* from, int64_t along, int64_t across, int64_t inner, int64_t outer, int64_t padded, P* to) {
  constexpr int pair = kPair<P>;
  int64_t panels = ceil_div(outer, kPanel);
  for (int64_t panel = 0; panel < panels; ++panel) {
    P* start = to + panel * padded * kPanel;
    int64_t columns = std::min<int64_t>(kPanel, outer - panel * kPanel);
    const T* source = from + panel * kPanel * across;
    if (columns < kPanel || inner < padded) std::fill(start, start + padded * kPanel, P(0));
    if constexpr (std::is_same_v<T, P> && std::is_same_v<P, BFloat16>) {
      if (along == 1 && inner % pair == 0) {  // pairs lie in memory as they are packed
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t i = 0; i < inner; i += pair) std::memcpy(start + i * kPanel + c * pair, source + c * across + i, 4);
        continue;
      }
      if (across == 1 && columns == kPanel) {  // two rows are interleaved
        for (int64_t i = 0; i < inner; i += pair)
          for (int64_t c = 0; c < kPanel; c += kLanes) {
            BitVec first = (BitVec)load(source + i * along + c) >> 16;
            BitVec second = i + 1 < inner ? (BitVec)load(source + (i + 1) * along + c) : BitVec{};
            second |= first;
            std::memcpy(start + i * kPanel + c * pair, &second, sizeof second);
          }
        continue;
      }
    }
    if (along == 1) {
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t i = 0; i < inner; ++i) start[(i / pair) * kPanel * pair + c * pair + i % pair] = source[c * across + i];
    } else {
      for (int64_t i = 0; i < inner; ++i)
        for (int64_t c = 0; c < columns; ++c)
          start[(i / pair) * kPanel * pair + c * pair + i % pair] = source[i * along + c * across];
    }
  }
}

// The value where the mask is true, `other` elsewhere.
inline Vec where(const bool* mask, Vec value, float other) {
#if defined(__AVX512F__)
  __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(mask)));
  return (Vec)_mm512_mask_mov_ps(_mm512_set1_ps(other), _mm512_test_epi32_mask(wide, wide), (__m512)value);
#else
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = mask[lane] ? value[lane] : other;
  return value;
#endif
}

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Scales, softcaps, biases and masks a vector of scores. bias, seen: at its first key, or null; keys past `left` are masked.
template <typename Call>
inline Vec finish_score(const Call& call, Vec value, int64_t left, const float* bias, const bool* seen) {
  int64_t stride = call.bias_strides.column;
  value *= call.scale;
  if (call.softcap != 0) value = call.softcap * hyperbolic_tangent(value / call.softcap);
  if (bias && left > 0) value += stride == 1 ? load_some(bias, left) : splat(*bias);
  if (seen && left > 0) {
    if (stride == 1 && left >= kLanes) value = where(seen, value, kHidden);
    else
      for (int lane = 0; lane < std::min<int64_t>(left, kLanes); ++lane)
        if (!seen[lane * stride]) value[lane] = kHidden;
  }
  for (int64_t lane = std::max<int64_t>(left, 0); lane < kLanes; ++lane) value[lane] = kHidden;
  return value;
}

// The same for a row of scores in place; keys past `visible` are masked.
template <typename Call>
inline void finish_scores(const Call& call, float* row, int64_t visible, int64_t padded, const float* bias, const bool* seen) {
  int64_t stride = call.bias_strides.column;
  for (int64_t c = 0; c < padded; c += kLanes) {
    const float* added = bias ? bias + c * stride : nullptr;
    store(row + c, finish_score(call, load(row + c), visible - c, added, seen ? seen + c * stride : nullptr));
  }
}

// Softmax of a row of scores into `to`, which may be the row, without the division: returns the sum to divide by. Scores outside of
// `visible` and other masked ones, and padding, become 0; the row may change. has_hole: hidden keys in between were left out.
template <typename Call, typename P>
inline float softmax(const Call& call, float* row, Span visible, int64_t padded, const float* bias, const bool* seen,
                    const float* sink, P* to, bool has_hole = false) {
  float scale = 1.0f;
  bool all_seen = !has_hole && (!seen || (call.bias_strides.column != 1 ? *seen
                                                                        : !std::memchr(seen + visible.begin, 0, visible.end - visible.begin)));
  if (call.softcap == 0 && !bias && all_seen && call.scale != 0) {  // scaling is then folded into the argument of the exponential
    scale = call.scale;
    std::fill(row + visible.end, row + padded, scale > 0 ? kHidden : -kHidden);
  } else {
    finish_scores(call, row, visible.end, padded, bias, seen);
  }
  std::fill(row, row + visible.begin, scale > 0 ? kHidden : -kHidden);
  Vec highest = splat(kHidden);
  for (int64_t c = 0; c < padded; c += kLanes) highest = maximum(load(row + c) * scale, highest);  // ignores NaN
  float top = largest(highest);
  if (sink) top = std::max(top, *sink);
  auto has_nan = [&] { return std::any_of(row, row + padded, [](float score) { return std::isnan(score); }); };
  if (top == kHidden && !has_nan()) {  // a fully masked row yields zeros, as PyTorch's operator does
    std::fill(to, to + padded, P(0));
    return 1.0f;
  }
  Vec total = splat(0.0f);
  for (int64_t c = 0; c < padded; c += kLanes) {
    Vec value = exponential(load(row + c) * scale - top);
    store(to + c, value);
    total += value;
  }
  return sum(total) + (sink ? std::exp(*sink - top) : 0.0f);
}

// Softmax of one row of the call, whose scores start at the key `from`.
template <typename Call, typename P>
inline float softmax_row(const Call& call, const VisibleKeys& visible_keys, int64_t b, int64_t h, int64_t row, int64_t from,
                         float* scores, int64_t padded, P* to) {
  Span seen = visible_keys.of(b, h, row), visible{std::max<int64_t>(seen.begin - from, 0), std::max<int64_t>(seen.end - from, 0)};
  int64_t offset = call.bias_strides.at(b, h, row) + from * call.bias_strides.column;
  return softmax(call, scores, visible, padded, call.bias ? call.bias + offset : nullptr, call.mask ? call.mask + offset : nullptr,
                call.sink(b, h), to);
}

// P: the dtype in which queries, keys, weights and values are multiplied.
template <typename P>
struct Scratch {
  std::vector<P> keys, values, weights, query;
  std::vector<float> scores;
  int64_t packed_from = -1, packed_begin = 0, packed_end = 0;  // whose keys are packed, and which
};

// Packs the keys and values of a head, for `depth` features and `width` keys.
template <typename T, typename P>
inline void pack_head(const Attention<T>& call, int64_t b, int64_t group, Span seen, int64_t depth, int64_t width,
                      Scratch<P>& scratch) {
  int64_t from = b * call.key_heads + group;  // heads that share keys are consecutive, and reuse the packed keys
  if (scratch.packed_from == from && scratch.packed_begin == seen.begin && scratch.packed_end == seen.end) return;
  int64_t keys = seen.end - seen.begin;
  scratch.keys.resize(depth * width);
  scratch.values.resize(width * ceil_div(call.value_dim, kPanel) * kPanel);
  pack(call.key(b, group, seen.begin), call.k_strides.column, call.k_strides.row, call.head_dim, keys, depth, scratch.keys.data());
  pack(call.value(b, group, seen.begin), call.v_strides.row, call.v_strides.column, keys, call.value_dim, width,
       scratch.values.data());
  scratch.packed_from = from, scratch.packed_begin = seen.begin, scratch.packed_end = seen.end;
}

template <typename T, typename P>
inline void head(const Attention<T>& call, const VisibleKeys& visible_keys, int64_t b, int64_t h, int64_t begin, int64_t end,
                 Scratch<P>& scratch) {
  constexpr int pair = kPair<P>;
  int64_t depth = ceil_div(call.head_dim, pair) * pair;
  Span seen = visible_keys.of(b, h, begin, end);                 // keys outside are not read, and counted from its begin
  int64_t width = ceil_div(seen.end - seen.begin, kPanel) * kPanel;        // keys, filled up to whole panels
  int64_t line = width + kLanes;  // of scores: not a power of two, which would map all rows to the same cache sets
  scratch.scores.resize(kRows * line);
  if (pair == 2) scratch.weights.resize(kRows * line);
  pack_head(call, b, h / (call.heads / call.key_heads), seen, depth, width, scratch);
  in_pieces(begin, end, kRows, [&](int64_t top, int64_t bottom) {
    Span tile = visible_keys.of(b, h, top, bottom);
    int64_t skipped = std::max<int64_t>(tile.begin - seen.begin, 0) / kPanel * kPanel;
    int64_t padded = std::max(skipped, ceil_div(tile.end - seen.begin, kPanel) * kPanel);
    with_rows(static_cast<int>(bottom - top), [&](auto count) {
      constexpr int R = decltype(count)::value;
      const P* q;
      int64_t q_stride = call.q_strides.row;
      const T* given = call.query(b, h, top);
      if constexpr (std::is_same_v<T, P>) q = given;
      if (!std::is_same_v<T, P> || depth != call.head_dim) {  // an odd head_dim is padded, since bfloat16 is read in pairs
        scratch.query.assign(R * depth, P(0));
        for (int r = 0; r < R; ++r)
          std::copy(given + r * q_stride, given + r * q_stride + call.head_dim, scratch.query.data() + r * depth);
        q = scratch.query.data(), q_stride = depth;
      }
      float* scores = scratch.scores.data();
      for (int64_t c = skipped; c < padded; c += kChunk) {
        Vec sums[R][kWide] = {};
        const P* panel = scratch.keys.data() + c / kPanel * depth * kPanel + c % kPanel * pair;
        multiply<R>(q, q_stride, panel, depth / pair, sums);
        for (int r = 0; r < R; ++r)
          for (int w = 0; w < kWide; ++w) store(scores + r * line + c + w * kLanes, sums[r][w]);
      }
      P* weights;
      if constexpr (pair == 2) weights = scratch.weights.data();
      else weights = scores;
      float inverse[R];
      for (int r = 0; r < R; ++r) {
        int64_t place = r * line + skipped;
        inverse[r] = 1.0f / softmax_row(call, visible_keys, b, h, top + r, seen.begin + skipped, scores + place, padded - skipped,
                                        weights + place);
      }
      for (int64_t c = 0; c < call.value_dim; c += kChunk) {
        Vec sums[R][kWide] = {};
        const P* panel = scratch.values.data() + (c / kPanel * width + skipped) * kPanel + c % kPanel * pair;
        multiply<R>(weights + skipped, line, panel, (padded - skipped) / pair, sums);
        for (int r = 0; r < R; ++r) {
          T* y = call.output(b, h, top + r);
          for (int w = 0; w < kWide && c + w * kLanes < call.value_dim; ++w)
            store_some(y + c + w * kLanes, sums[r][w] * inverse[r], call.value_dim - c - w * kLanes);
        }
      }
    });
  });
}

// The same by tiles.
inline void head_by_tiles(const Attention<BFloat16>& call, const VisibleKeys& visible_keys, int64_t b, int64_t h, int64_t begin,
                          int64_t end, Scratch<BFloat16>& scratch) {
  static_assert(kPanel % kInTile == 0);
  int64_t depth = ceil_div(call.head_dim, kInTile) * kInTile;
  Span seen = visible_keys.of(b, h, begin, end);
  int64_t width = ceil_div(seen.end - seen.begin, kPanel) * kPanel;
  scratch.scores.resize(kAmxRows * width), scratch.weights.resize(kAmxRows * width);
  pack_head(call, b, h / (call.heads / call.key_heads), seen, depth, width, scratch);
  alignas(64) float sums[kAmxRows * kPanel];
  AmxScope scope;
  for (int64_t top = begin; top < end; top += kAmxRows) {
    int64_t rows = std::min<int64_t>(kAmxRows, end - top);
    Span tile = visible_keys.of(b, h, top, top + rows);
    int64_t skipped = std::max<int64_t>(tile.begin - seen.begin, 0) / kPanel * kPanel;
    int64_t padded = std::max(skipped, ceil_div(tile.end - seen.begin, kPanel) * kPanel);
    scratch.query.assign(kAmxRows * depth, BFloat16(0));
    for (int64_t r = 0; r < rows; ++r) {
      const BFloat16* q = call.query(b, h, top + r);
      std::copy(q, q + call.head_dim, scratch.query.data() + r * depth);
    }
    float* scores = scratch.scores.data();
    for (int64_t c = skipped; c < padded; c += kPanel)
      amx_product<BFloat16>(rows, scratch.query.data(), depth * sizeof(BFloat16),
                            amx_panel(scratch.keys.data() + c * depth, depth), scores + c, width * sizeof(float));
    float inverse[kAmxRows];
    for (int64_t r = 0; r < rows; ++r) {
      float* line = scores + r * width;
      inverse[r] = 1.0f / softmax_row(call, visible_keys, b, h, top + r, seen.begin + skipped, line + skipped, padded - skipped,
                                      scratch.weights.data() + r * width + skipped);
    }
    for (int64_t c = 0; c < call.value_dim; c += kPanel) {
      amx_product<BFloat16>(rows, scratch.weights.data() + skipped, width * sizeof(BFloat16),
                            amx_panel(scratch.values.data() + c * width + skipped * kPanel, padded - skipped), sums, kPanelBytes);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = c; d < std::min(call.value_dim, c + kPanel); d += kLanes)
          store_some(call.output(b, h, top + r) + d, load(sums + r * kPanel + d - c) * inverse[r], call.value_dim - d);
    }
  }
}

// Prefetches the operands of a head into the L2 cache: rows of a merged projection are pages apart, beyond the hardware prefetcher.
template <typename T>
inline void fetch(const Attention<T>& call, const VisibleKeys& visible_keys, int64_t b, int64_t h) {
  Span seen = visible_keys.of(b, h, 0, call.queries);
  int64_t group = h / (call.heads / call.key_heads);
  auto rows = [](const T* from, const Strides& strides, int64_t count, int64_t columns) {
    if (strides.column != 1) return;
    for (int64_t row = 0; row < count; ++row)
      for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(from + row * strides.row + c, 0, 2);
  };
  rows(call.key(b, group, seen.begin), call.k_strides, seen.end - seen.begin, call.head_dim);
  rows(call.value(b, group, seen.begin), call.v_strides, seen.end - seen.begin, call.value_dim);
  rows(call.query(b, h, 0), call.q_strides, call.queries, call.head_dim);
}

// Attention of few queries, as in decode: packing would cost more than it saves, so keys and values are read in place, once for all
// heads that share them.
constexpr int64_t kFewRows = 16;

// Scores of R queries with keys [begin, end); those of query r are written to scores + r * width.
template <int R, typename T, typename Cache>
inline void score_rows(const T* const (&q)[R], const Cache* k, int64_t k_stride, int64_t begin, int64_t end, int64_t depth,
                       float* scores, int64_t width) {
  constexpr int kKeys = 4;
  for (int64_t key = begin; key < end; key += kKeys) {
    const Cache* rows[kKeys];
    for (int c = 0; c < kKeys; ++c) rows[c] = k + std::min(key + c, end - 1) * k_stride;
    Vec sums[R][kKeys] = {};
    for (int64_t d = 0; d < depth; d += kLanes) {
      Vec columns[kKeys];
#pragma GCC unroll 4
      for (int c = 0; c < kKeys; ++c) columns[c] = load_some(rows[c] + d, depth - d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec value = load_some(q[r] + d, depth - d);
#pragma GCC unroll 4
        for (int c = 0; c < kKeys; ++c) sums[r][c] += value * columns[c];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kKeys && key + c < end; ++c) scores[r * width + key + c - begin] = sum(sums[r][c]);
  }
}

// y = weights of R rows times the values of some spans of keys, times the inverse of each row's sum of weights.
template <int R, typename T, typename Cache>
inline void weighted_sum(const float* weights, int64_t width, const float* inverse, const Cache* v, int64_t v_stride,
                       const Span* spans, int64_t count, int64_t value_dim, T* const (&y)[R]) {
  for (int64_t d = 0; d < value_dim; d += 2 * kLanes) {
    int64_t left = value_dim - d;
    Vec sums[R][2] = {};
    const float* place = weights;
    for (int64_t n = 0; n < count; place += spans[n].end - spans[n].begin, ++n) {
      for (int64_t key = spans[n].begin; key < spans[n].end; ++key) {
        const Cache* row = v + key * v_stride + d;
        Vec low = load_some(row, left), high = left > kLanes ? load_some(row + kLanes, left - kLanes) : splat(0.0f);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec weight = splat(place[r * width + key - spans[n].begin]);
          sums[r][0] += weight * low, sums[r][1] += weight * high;
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      store_some(y[r] + d, sums[r][0] * inverse[r], left);
      if (left > kLanes) store_some(y[r] + d + kLanes, sums[r][1] * inverse[r], left - kLanes);
    }
  }
}

// The keys that rows of a group read, in order, as spans; hidden ones in between are left out where there are many.
struct FewKeys {
  static constexpr int64_t kHole = 64;
  std::vector<Span> spans{};
  std::vector<char> seen{};  // the mask of their keys where there is more than one span

  // Of one query; or of several, with one span that is the join of theirs. They begin at whole vectors, so that a row's sums are
  // added in the same order whatever is computed beside it.
  template <typename Call>
  void find(const Call& call, Span whole, int64_t b, int64_t h, int64_t row, bool alone) {
    spans.clear();
    whole.begin = whole.begin / kLanes * kLanes;
    const bool* mask = call.mask && alone && call.bias_strides.column == 1 ? call.mask + call.bias_strides.at(b, h, row) : nullptr;
    for (int64_t begin = whole.begin; mask && begin < whole.end;) {
      const void* hidden = std::memchr(mask + begin, 0, whole.end - begin);
      int64_t end = hidden ? static_cast<const bool*>(hidden) - mask : whole.end;
      const void* next = end < whole.end ? std::memchr(mask + end, 1, whole.end - end) : nullptr;
      int64_t after = next ? static_cast<const bool*>(next) - mask : whole.end;
      // Whole vectors, so that each key's place in one is that in a single span.
      Span aligned{begin / kLanes * kLanes, std::min(ceil_div(end, kLanes) * kLanes, whole.end)};
      if (!spans.empty() && aligned.begin - spans.back().end < kHole) spans.back().end = aligned.end;
      else if (end > begin) spans.push_back(aligned);
      begin = after;
    }
    if (spans.size() > 1) {
      seen.clear();
      for (const Span& span : spans) seen.insert(seen.end(), mask + span.begin, mask + span.end);
    } else {
      spans.assign(1, whole);
    }
  }

  int64_t count() const {
    int64_t found = 0;
    for (const Span& span : spans) found += span.end - span.begin;
    return found;
  }
};

// R rows from `first` on of a group: all heads of its first query, then of the next.
template <int R, typename T, typename Cache>
inline void some_rows(const Attention<T, Cache>& call, const VisibleKeys& visible_keys, int64_t b, int64_t group, int64_t first,
                      std::vector<float>& scratch, FewKeys& keys) {
  int64_t shared = call.heads / call.key_heads;
  const T* q[R];
  T* y[R];
  Span whole{0, 0};
  auto place = [&](int r) { return std::pair(group * shared + (first + r) % shared, (first + r) / shared); };
  for (int r = 0; r < R; ++r) {
    auto [h, row] = place(r);
    q[r] = call.query(b, h, row), y[r] = call.output(b, h, row);
    whole = joined(whole, visible_keys.of(b, h, row));
  }
  keys.find(call, whole, b, group * shared, first / shared, place(R - 1).second == first / shared && !call.bias_strides.head);
  const int64_t count = keys.count(), padded = ceil_div(count, kLanes) * kLanes;
  scratch.resize(R * padded);
  float* scores = scratch.data();
  const Cache *k = call.key(b, group, 0), *v = call.value(b, group, 0);
  auto scale_by = [&](const float* scale) {
    if (!scale) return;
    scale += (b * call.key_heads + group) * call.keys;
    int64_t from = 0;
    for (const Span& span : keys.spans)
      for (int64_t key = span.begin; key < span.end; ++key, ++from)
        for (int r = 0; r < R; ++r) scores[r * padded + from] *= scale[key];
  };
  int64_t from = 0;
  for (const Span& span : keys.spans) {
    score_rows<R>(q, k, call.k_strides.row, span.begin, span.end, call.head_dim, scores + from, padded);
    from += span.end - span.begin;
  }
  scale_by(call.k_scale);
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    auto [h, row] = place(r);
    float* line = scores + r * padded;
    if (keys.spans.size() == 1) {
      inverse[r] = 1.0f / softmax_row(call, visible_keys, b, h, row, keys.spans[0].begin, line, padded, line);
    } else {
      const bool* seen = reinterpret_cast<const bool*>(keys.seen.data());
      inverse[r] = 1.0f / softmax(call, line, Span{0, count}, padded, nullptr, seen, call.sink(b, h), line, true);
    }
  }
  scale_by(call.v_scale);
  weighted_sum<R>(scores, padded, inverse, v, call.v_strides.row, keys.spans.data(), keys.spans.size(), call.value_dim, y);
}

template <typename T, typename Cache>
void few_rows(const Attention<T, Cache>& call, const VisibleKeys& visible_keys) {
  constexpr int64_t kMost = 4;
  int64_t groups = call.batch * call.key_heads, shared = call.heads / call.key_heads, rows = shared * call.queries;
  // Rows of one query; or of several, where each query has one head, as long as they read about the same keys.
  auto end_of = [&](int64_t b, int64_t group, int64_t first, int64_t end) {
    auto seen = [&](int64_t row) { return visible_keys.of(b, group * shared + row % shared, row / shared); };
    Span whole = seen(first);
    int64_t longest = whole.end - whole.begin, last = first + 1;
    if (shared > 1) end = std::min(end, (first / shared + 1) * shared);
    for (; last < std::min(first + kMost, end); ++last) {
      Span next = seen(last), both = joined(whole, next);
      longest = std::max(longest, next.end - next.begin);
      if (both.end - both.begin > longest + FewKeys::kHole) break;
      whole = both;
    }
    return last;
  };
  // The rows of one group are split among threads only where there are fewer groups than threads.
  int64_t parts = std::max<int64_t>(1, std::min(rows, at::get_num_threads() / std::max<int64_t>(groups, 1)));
  at::parallel_for(0, groups * parts, 1, [&](int64_t from, int64_t to) {
    std::vector<float> scratch;
    FewKeys keys;
    for (int64_t item = from; item < to; ++item) {
      int64_t group = item / parts % call.key_heads, b = item / parts / call.key_heads, part = item % parts;
      int64_t first = rows * part / parts, end = rows * (part + 1) / parts;
      for (int64_t last; first < end; first = last) {
        last = end_of(b, group, first, end);
        with_rows(static_cast<int>(last - first), [&](auto count) {
          constexpr int R = decltype(count)::value;
          if constexpr (R <= kMost) some_rows<R>(call, visible_keys, b, group, first, scratch, keys);
        });
      }
    }
  });
}

template <typename T>
void run(const Attention<T>& call, const VisibleKeys& visible_keys) {
  if (call.queries <= kFewRows && call.k_strides.column == 1 && call.v_strides.column == 1) return few_rows(call, visible_keys);
  int64_t threads = at::get_num_threads(), heads = call.batch * call.heads, shared = call.heads / call.key_heads;
  // With few heads, the rows of a head are split among threads too; each share packs the keys again.
  int64_t shares = heads >= 4 * threads ? 1 : std::max<int64_t>(1, std::min(ceil_div(4 * threads, heads), call.queries / 64));
  // Within a band the keys of fewer rows are fewer, and stay in the L2 cache.
  if (int64_t across = call.band.high - call.band.low; across < call.keys)
    shares = std::max(shares, call.queries / std::max<int64_t>(256, across / 2));
  auto all_heads = [&](auto zero, auto one_head) {
    at::parallel_for(0, heads * shares, 1, [&](int64_t from, int64_t to) {
      Scratch<decltype(zero)> scratch;
      for (int64_t item = from; item < to; ++item) {
        // Heads that share keys follow each other, each with the same rows, and reuse the packed keys.
        int64_t group = item / (shares * shared), share = item / shared % shares, which = group * shared + item % shared;
        if (share == 0 && which + 1 < heads) fetch(call, visible_keys, (which + 1) / call.heads, (which + 1) % call.heads);
        int64_t begin = call.queries * share / shares, end = call.queries * (share + 1) / shares;
        one_head(which / call.heads, which % call.heads, begin, end, scratch);
      }
    });
  };
  if constexpr (std::is_same_v<T, BFloat16>)
    if (amx.load(std::memory_order_relaxed) && call.queries >= kFewestAmxRows)
      return all_heads(T{}, [&](auto&&... sizes) { head_by_tiles(call, visible_keys, sizes...); });
  with_operand<T>([&](auto zero) { all_heads(zero, [&](auto&&... sizes) { head(call, visible_keys, sizes...); }); });
}

// The queries of several sequences in one call see keys that lie apart: those of each are computed on their own, or few together.
template <typename T>
void run(const Attention<T>& call) {
  const VisibleKeys visible_keys(call);
  if (call.batch > 1 || call.queries <= kFewRows || !call.mask || call.bias_strides.head) return run(call, visible_keys);
  int64_t begin = 0;
  auto run_until = [&](int64_t end) {
    if (begin < end) run(call.part(begin, end), visible_keys.after(begin));
    begin = end;
  };
  for (int64_t row = 0, end; row < call.queries; row = end) {
    end = visible_keys.end_of_neighbours(row, call.queries, FewKeys::kHole);
    if (end - begin > kFewRows) run_until(row);
    if (end - row > kFewRows) run_until(end);
  }
  run_until(call.queries);
}

// Several calls of one batch each, of the same heads; their heads are divided among threads together.
template <typename T>
void run(const std::vector<Attention<T>>& calls) {
  std::vector<VisibleKeys> visible_keys(calls.begin(), calls.end());
  int64_t heads = calls[0].heads, items = static_cast<int64_t>(calls.size()) * heads;
  auto all_heads = [&](auto zero, auto&& wanted, auto&& one_head) {
    at::parallel_for(0, items, 1, [&](int64_t from, int64_t to) {
      Scratch<decltype(zero)> scratch;
      for (int64_t item = from; item < to; ++item) {
        const Attention<T>& call = calls[item / heads];
        if (!wanted(call)) continue;
        if (item == from || item % heads == 0) scratch.packed_from = -1;  // of another text
        one_head(call, visible_keys[item / heads], item % heads, scratch);
      }
    });
  };
  bool tiles = false;
  if constexpr (std::is_same_v<T, BFloat16>) {
    tiles = amx.load(std::memory_order_relaxed);
    if (tiles)
      all_heads(T{}, [](auto& call) { return call.queries >= kFewestAmxRows; }, [](auto& call, auto& visible, int64_t h, auto& scratch) {
        head_by_tiles(call, visible, 0, h, 0, call.queries, scratch);
      });
  }
  with_operand<T>([&](auto zero) {
    all_heads(zero, [&](auto& call) { return !tiles || call.queries < kFewestAmxRows; },
              [](auto& call, auto& visible, int64_t h, auto& scratch) { head(call, visible, 0, h, 0, call.queries, scratch); });
  });
}

}  // namespace lissom
