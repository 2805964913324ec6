// Block-sparse attention with a pattern of positions: one tile of queries at a time, over the panels of keys visible to it, with an
// online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
#pragma once

#include "attention.h"
#include "pattern.h"

#include <atomic>
#include <memory>
#include <numeric>

namespace lissom {

constexpr int64_t kTile = 64;  // queries that share packed panels

template <typename T>
struct BlockSparse {
  Attention<T> call;
  Pattern pattern;
};

// Uninitialised memory aligned to a cache line, so that no vector load crosses one.
template <typename T>
class Buffer {
 public:
  T* of(int64_t count) {
    if (count > held_) data_.reset(static_cast<T*>(aligned_memory(count * sizeof(T)))), held_ = count;
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t held_ = 0;
};

// Sizes that are the same for every tile. P: the dtype in which queries, keys, weights and values are multiplied.
template <typename P>
struct Shape {
  int64_t depth, width, outputs;  // head_dim, keys and value_dim, padded
  int64_t tile;                   // queries
  int64_t chunk;                  // panels whose scores are held at a time
  int64_t stride;                 // of a row of scores

  template <typename T>
  explicit Shape(const BlockSparse<T>& sparse, bool tiled) {
    const Attention<T>& call = sparse.call;
    const int64_t unit = tiled ? kInTile : kPair<P>;
    depth = ceil_div(call.head_dim, unit) * unit;
    width = ceil_div(call.keys, kPanel) * kPanel;
    outputs = ceil_div(call.value_dim, kPanel) * kPanel;
    tile = tile_of(sparse.pattern);
    constexpr int64_t kBytes = 1 << 18;  // of keys and values: they stay in the L2 cache while the rows of a tile are computed
    chunk = std::clamp<int64_t>(kBytes / ((depth + outputs) * kPanel * int64_t(sizeof(P))), 4, 16);
    stride = chunk * kPanel + kLanes;  // not a power of two, which would map all rows to the same cache sets
  }

  // Rows of one tile should see the same blocks: where the block size does not divide kTile, a tile is one block.
  static int64_t tile_of(const Pattern& pattern) {
    int64_t unit = 0;
    for (const auto& conditions : pattern.alternatives)
      for (const Condition& condition : conditions)
        if (condition.reads_layout()) unit = std::gcd(unit, pattern.block);
        else if (condition.query != 0 && condition.unit > 1) unit = std::gcd(unit, condition.unit);
    constexpr int64_t kLeast = 16;
    int64_t tile = std::min(unit, kTile);
    while (tile >= kLeast && unit % tile != 0) --tile;
    return tile < kLeast ? kTile : tile;
  }
};

struct Run {
  int64_t panel, count;  // consecutive panels
};

template <typename P>
struct TileScratch {
  Buffer<P> keys, values, query, weights;
  Buffer<float> scores, sums;
  std::vector<char> packed;       // by panel
  int64_t packed_from = -1;       // the batch and key head the panels are packed from
  PanelVisibility visibility;
  PanelTest test;
  std::vector<int64_t> panels;
  std::vector<char> masked;       // by panel: whether the call's own mask may hide some key
  std::vector<Run> runs;
  std::vector<Span> spans;
  float top[kTile], total[kTile];  // per row: the maximum of its scores so far, and the sum of its weights
};

// Packs a panel of keys and values unless it is packed already.
template <typename T, typename P>
inline void pack_panel(const Attention<T>& call, const Shape<P>& shape, int64_t b, int64_t group, int64_t panel,
                       TileScratch<P>& scratch) {
  if (scratch.packed[panel]) return;
  scratch.packed[panel] = 1;
  int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, call.keys - first);
  const T *k = call.key(b, group, first), *v = call.value(b, group, first);
  pack(k, call.k_strides.column, call.k_strides.row, call.head_dim, count, shape.depth,
       scratch.keys.of(shape.depth * shape.width) + first * shape.depth);
  P* values = scratch.values.of(shape.width * shape.outputs) + first * kPanel;
  for (int64_t c = 0; c < call.value_dim; c += kPanel)
    pack(v + c * call.v_strides.column, call.v_strides.row, call.v_strides.column, count,
         std::min<int64_t>(kPanel, call.value_dim - c), kPanel, values + c * shape.width);
}

// Lists the panels visible to some row of a tile, without those that the call's own mask hides from all rows.
template <typename T, typename P>
inline void list_panels(const BlockSparse<T>& sparse, int64_t b, int64_t h, Span rows, TileScratch<P>& scratch) {
  const Attention<T>& call = sparse.call;
  scratch.visibility.find(sparse.pattern, h, rows, call.keys);
  scratch.panels.clear();
  scratch.masked.assign(scratch.visibility.panels.size(), call.mask != nullptr);
  const Strides& strides = call.bias_strides;
  const bool* seen = call.mask && strides.row == 0 ? call.mask + strides.at(b, h, 0) : nullptr;
  for (int64_t panel = 0; panel < int64_t(scratch.visibility.panels.size()); ++panel) {
    if (scratch.visibility.panels[panel] == Visibility::kNone) continue;
    int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, call.keys - first);
    if (seen && (strides.column == 1 ? !std::memchr(seen + first, 1, count) : !*seen)) continue;
    if (seen) scratch.masked[panel] = strides.column == 1 && std::memchr(seen + first, 0, count);
    scratch.panels.push_back(panel);
  }
}

// Finishes a vector of scores of one row, starting at `key`, and masks it by the pattern. bias: where the row's bias or mask starts.
template <typename T>
inline Vec finish_score(const Attention<T>& call, Vec value, int64_t bias, int64_t key, const PanelTest* test, int64_t column) {
  bias += key * call.bias_strides.column;
  value = finish_score(call, value, call.keys - key, call.bias ? call.bias + bias : nullptr, call.mask ? call.mask + bias : nullptr);
  if (test) value = (*test)(column) ? value : splat(kHidden);
  return value;
}

// results += weights times values, by tiles of AMX.
template <typename T, typename P>
inline void add_values_by_tiles(const Attention<T>& call, const Shape<P>& shape, int64_t rows, const P* weights, const P* values,
                                float* results, const std::vector<Run>& runs) {
  alignas(64) float sums[kAmxRows * kPanel];
  for (int64_t c = 0; c < call.value_dim; c += kPanel) {
    const P* weight = weights;
    for (const Run& run : runs) {
      amx_product<P>(rows, weight, shape.stride * sizeof(P),
                     amx_panel(values + c * shape.width + run.panel * kPanel * kPanel, run.count * kPanel), sums, kPanelBytes);
      weight += run.count * kPanel;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < kPanel; d += kLanes) {
          float* place = results + r * shape.outputs + c + d;
          store(place, load(place) + load(sums + r * kPanel + d));
        }
    }
  }
}

// Updates `rows` rows of a tile, starting at its row `first`, with some of the panels visible to it. By vectors there are R rows, a
// constant; by tiles of AMX at most R.
template <int R, bool tiled, typename Rows, typename T, typename P>
inline void some_panels(const BlockSparse<T>& sparse, const Shape<P>& shape, int64_t b, int64_t h, int64_t row, int64_t first,
                        Rows rows, const int64_t* panels, int64_t count, TileScratch<P>& scratch) {
  constexpr int pair = kPair<P>;
  const Attention<T>& call = sparse.call;
  const P* q = scratch.query.of(0) + first * shape.depth;
  const P* keys = scratch.keys.of(0);
  float* scores = scratch.scores.of(0);
  const Strides& strides = call.bias_strides;
  int64_t bias = strides.at(b, h, row);
  bool plain = !call.bias && call.softcap == 0;
  Vec highest[R];
  for (int r = 0; r < rows; ++r) highest[r] = splat(kHidden);
  int64_t kept = 0;
  scratch.runs.clear();
  for (int64_t n = 0; n < count; ++n) {
    int64_t panel = panels[n], key = panel * kPanel;
    Visibility visibility = scratch.visibility.panels[panel];
    if (visibility == Visibility::kPartial)
      visibility = scratch.test.prepare(sparse.pattern, scratch.visibility, h, {row, row + rows},
                                        {key, std::min(key + kPanel, call.keys)});
    if (visibility == Visibility::kNone) continue;
    bool untouched = plain && !scratch.masked[panel] && visibility == Visibility::kFull && key + kPanel <= call.keys;
    if constexpr (tiled)
      amx_product<P>(rows, q, shape.depth * sizeof(P), amx_panel(keys + key * shape.depth, shape.depth),
                     scores + kept * kPanel, shape.stride * sizeof(float));
    for (int64_t c = 0; c < kPanel; c += kChunk) {
      float* to = scores + kept * kPanel + c;
      Vec sums[R][kWide] = {};
      if constexpr (tiled) {
        for (int r = 0; r < rows; ++r)
          for (int w = 0; w < kWide; ++w) sums[r][w] = load(to + r * shape.stride + w * kLanes);
      } else {
        multiply<R>(q, shape.depth, keys + key * shape.depth + c * pair, shape.depth / pair, sums);
      }
      if (untouched) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
          for (int w = 0; w < kWide; ++w) {
            Vec value = sums[r][w] * call.scale;
            store(to + r * shape.stride + w * kLanes, value);
            highest[r] = maximum(value, highest[r]);
          }
        continue;
      }
      for (int r = 0; r < rows; ++r) {
        if (visibility == Visibility::kPartial) scratch.test.start(row + r);
        for (int w = 0; w < kWide; ++w) {
          int64_t column = c + w * kLanes;
          Vec value = finish_score(call, sums[r][w], bias + r * strides.row, key + column,
                               visibility == Visibility::kPartial ? &scratch.test : nullptr, column);
          store(to + r * shape.stride + w * kLanes, value);
          highest[r] = maximum(value, highest[r]);
        }
      }
    }
    if (!scratch.runs.empty() && scratch.runs.back().panel + scratch.runs.back().count == panel) ++scratch.runs.back().count;
    else scratch.runs.push_back({panel, 1});
    ++kept;
  }
  if (kept == 0) return;
  float* results = scratch.sums.of(0) + first * shape.outputs;
  P* weights = pair == 2 ? scratch.weights.of(0) : reinterpret_cast<P*>(scores);
  for (int r = 0; r < rows; ++r) {
    float& top = scratch.top[first + r];
    float before = top, found = std::max(top, largest(highest[r]));
    float from = found == kHidden ? 0.0f : found;  // no visible key so far: exp(-∞ - 0) is 0, not NaN
    float* line = scores + r * shape.stride;
    Vec total = splat(0.0f);
    for (int64_t c = 0; c < kept * kPanel; c += kLanes) {
      Vec value = exponential(load(line + c) - from);
      total += value;
      store(weights + r * shape.stride + c, value);
    }
    float factor = before == found ? 1.0f : std::exp(before - found);
    scratch.total[first + r] = scratch.total[first + r] * factor + sum(total);
    top = found;
    if (factor != 1.0f)
      for (int64_t c = 0; c < shape.outputs; c += kLanes)
        store(results + r * shape.outputs + c, load(results + r * shape.outputs + c) * factor);
  }
  const P* values = scratch.values.of(0);
  if constexpr (tiled) return add_values_by_tiles(call, shape, rows, weights, values, results, scratch.runs);
  for (int64_t c = 0; c < call.value_dim; c += kChunk) {
    Vec sums[R][kWide];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) sums[r][w] = load(results + r * shape.outputs + c + w * kLanes);
    const P* column = values + c / kPanel * shape.width * kPanel + c % kPanel * pair;
    const P* weight = weights;
    for (const Run& run : scratch.runs) {
      multiply<R>(weight, shape.stride, column + run.panel * kPanel * kPanel, run.count * kPanel / pair, sums);
      weight += run.count * kPanel;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) store(results + r * shape.outputs + c + w * kLanes, sums[r][w]);
  }
}

template <bool tiled, typename T, typename P>
inline void one_tile(const BlockSparse<T>& sparse, const Shape<P>& shape, int64_t b, int64_t h, Span rows,
                     TileScratch<P>& scratch) {
  const Attention<T>& call = sparse.call;
  int64_t group = h / (call.heads / call.key_heads), count = rows.end - rows.begin;
  list_panels(sparse, b, h, rows, scratch);
  const T* q = call.query(b, h, rows.begin);
  P* query = scratch.query.of(kTile * shape.depth);
  for (int64_t r = 0; r < count; ++r) {
    std::copy(q + r * call.q_strides.row, q + r * call.q_strides.row + call.head_dim, query + r * shape.depth);
    std::fill(query + r * shape.depth + call.head_dim, query + (r + 1) * shape.depth, P(0));
  }
  float sink = call.sinks ? call.sinks[b * call.sink_batch + h * call.sink_head] : kHidden;
  std::fill(scratch.top, scratch.top + count, sink);
  std::fill(scratch.total, scratch.total + count, sink == kHidden ? 0.0f : std::exp(sink - sink));  // NaN where the sink is NaN
  float* results = scratch.sums.of(kTile * shape.outputs);
  std::fill(results, results + count * shape.outputs, 0.0f);
  constexpr int held_rows = tiled ? kAmxRows : kRows;
  scratch.scores.of(held_rows * shape.stride);
  if (kPair<P> == 2) scratch.weights.of(held_rows * shape.stride);
  int64_t panels = scratch.panels.size();
  for (int64_t start = 0; start < panels; start += shape.chunk) {
    int64_t some = std::min(shape.chunk, panels - start);
    const int64_t* first = scratch.panels.data() + start;
    for (int64_t n = 0; n < some; ++n) pack_panel(call, shape, b, group, first[n], scratch);
    if constexpr (tiled) {
      AmxScope scope;
      for (int64_t top = 0; top < count; top += kAmxRows)
        some_panels<kAmxRows, true>(sparse, shape, b, h, rows.begin + top, top, std::min<int64_t>(kAmxRows, count - top), first,
                                    some, scratch);
    } else {
      in_pieces(0, count, kRows, [&](int64_t top, int64_t bottom) {
        with_rows(static_cast<int>(bottom - top), [&](auto held) {
          some_panels<decltype(held)::value, false>(sparse, shape, b, h, rows.begin + top, top, held, first, some, scratch);
        });
      });
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    T* y = call.output(b, h, rows.begin + r);
    float inverse = scratch.total[r] == 0 ? 0.0f : 1.0f / scratch.total[r];  // a fully masked row yields zeros
    for (int64_t c = 0; c < call.value_dim; c += kLanes)
      store_some(y + c, load(results + r * shape.outputs + c) * inverse, call.value_dim - c);
  }
}

constexpr int64_t kFewBlockRows = 4;

// A call of R queries, one head of it: keys and values are read in place, as in dense attention.
template <int R, typename T>
inline void few_rows_of_head(const BlockSparse<T>& sparse, int64_t b, int64_t h, TileScratch<float>& scratch) {
  const Attention<T>& call = sparse.call;
  int64_t group = h / (call.heads / call.key_heads);
  list_panels(sparse, b, h, {0, R}, scratch);
  std::vector<Span>& spans = scratch.spans;
  spans.clear();
  for (int64_t panel : scratch.panels) {
    int64_t key = panel * kPanel, end = std::min(key + kPanel, call.keys);
    if (!spans.empty() && spans.back().end == key) spans.back().end = end;
    else spans.push_back({key, end});
  }
  int64_t width = scratch.panels.size() * kPanel;
  float* scores = scratch.scores.of(R * std::max<int64_t>(width, 1));
  const T* q[R];
  T* y[R];
  for (int r = 0; r < R; ++r) q[r] = call.query(b, h, r), y[r] = call.output(b, h, r);
  const T *k = call.key(b, group, 0), *v = call.value(b, group, 0);
  std::fill(scores, scores + R * width, 0.0f);  // scores past the last key are read too, and masked
  float* to = scores;
  for (const Span& span : spans) {
    score_rows<R>(q, k, call.k_strides.row, span.begin, span.end, call.head_dim, to, width);
    to += span.end - span.begin;
  }
  Vec highest[R];
  for (int r = 0; r < R; ++r) highest[r] = splat(kHidden);
  for (int64_t n = 0; n < int64_t(scratch.panels.size()); ++n) {
    int64_t panel = scratch.panels[n], key = panel * kPanel;
    bool tested = scratch.visibility.panels[panel] == Visibility::kPartial;
    if (tested) {
      Visibility visibility = scratch.test.prepare(sparse.pattern, scratch.visibility, h, {0, R},
                                                   {key, std::min(key + kPanel, call.keys)});
      tested = visibility != Visibility::kFull;
    }
    for (int r = 0; r < R; ++r) {
      if (tested) scratch.test.start(r);
      int64_t bias = call.bias_strides.at(b, h, r);
      for (int64_t column = 0; column < kPanel; column += kLanes) {
        float* place = scores + r * width + n * kPanel + column;
        Vec value = finish_score(call, load(place), bias, key + column, tested ? &scratch.test : nullptr, column);
        store(place, value);
        highest[r] = maximum(value, highest[r]);
      }
    }
  }
  float sink = call.sinks ? call.sinks[b * call.sink_batch + h * call.sink_head] : kHidden, inverse[R];
  for (int r = 0; r < R; ++r) {
    float top = std::max(sink, largest(highest[r])), from = top == kHidden ? 0.0f : top;
    Vec total = splat(0.0f);
    for (float* place = scores + r * width; place < scores + (r + 1) * width; place += kLanes) {
      Vec value = exponential(load(place) - from);
      total += value;
      store(place, value);
    }
    float whole = sum(total) + (sink == kHidden ? 0.0f : std::exp(sink - from));
    inverse[r] = whole == 0 ? 0.0f : 1.0f / whole;
  }
  weighted_sum<R>(scores, width, inverse, v, call.v_strides.row, spans.data(), spans.size(), call.value_dim, y);
}

template <typename T>
void few_rows(const BlockSparse<T>& sparse) {
  const Attention<T>& call = sparse.call;
  at::parallel_for(0, call.batch * call.heads, 1, [&](int64_t from, int64_t to) {
    TileScratch<float> scratch;
    for (; from < to; ++from)
      with_rows(static_cast<int>(call.queries), [&](auto count) {
        constexpr int R = decltype(count)::value;
        if constexpr (R <= kFewBlockRows) few_rows_of_head<R>(sparse, from / call.heads, from % call.heads, scratch);
      });
  });
}

template <typename P, bool tiled, typename T>
void run_as(const BlockSparse<T>& sparse) {
  const Attention<T>& call = sparse.call;
  Shape<P> shape(sparse, tiled);
  int64_t threads = at::get_num_threads(), groups = call.batch * call.key_heads, shared = call.heads / call.key_heads;
  int64_t tiles = ceil_div(call.queries, shape.tile);
  // With few key heads, the tiles of a head are split among threads too; each share packs the panels it reads.
  int64_t shares = groups >= 4 * threads ? 1 : std::min(ceil_div(4 * threads, groups), tiles);
  std::atomic<int64_t> next{0};  // shares differ in work: a thread that is done takes the next
  at::parallel_for(0, std::min(threads, groups * shares), 1, [&](int64_t from, int64_t to) {
    for (; from < to; ++from) {
      TileScratch<P> scratch;
      for (int64_t item = next++; item < groups * shares; item = next++) {
        int64_t which = item / shares, share = item % shares, b = which / call.key_heads, group = which % call.key_heads;
        if (scratch.packed_from != which) scratch.packed.assign(ceil_div(call.keys, kPanel), 0);
        scratch.packed_from = which;
        for (int64_t h = group * shared; h < (group + 1) * shared; ++h)
          for (int64_t tile = tiles * share / shares; tile < tiles * (share + 1) / shares; ++tile)
            one_tile<tiled>(sparse, shape, b, h, {tile * shape.tile, std::min((tile + 1) * shape.tile, call.queries)}, scratch);
      }
    }
  });
}

// The band that is the same as the pattern: that of a sliding window, or of all keys where it hides none of them from these
// queries, as a window hides none of a short text; none for other patterns.
template <typename T>
std::optional<Band> band_of(const BlockSparse<T>& sparse) {
  const Pattern& pattern = sparse.pattern;
  bool differences = pattern.alternatives.size() == 1;
  Band band;
  for (const auto& conditions : pattern.alternatives)
    for (const Condition& condition : conditions) {
      differences &= condition.key != 0 && condition.query == -condition.key && condition.unit == 1 && condition.modulus == 0;
      bool ahead = condition.key > 0;
      band.low = std::max(band.low, ahead ? condition.low : -condition.high);
      band.high = std::min(band.high, ahead ? condition.high : -condition.low);
    }
  if (differences) return band;
  PanelVisibility visibility;
  for (int64_t head = 0; head < pattern.heads; ++head) {
    visibility.find(pattern, head, {0, sparse.call.queries}, sparse.call.keys);
    for (Visibility panel : visibility.panels)
      if (panel != Visibility::kFull) return std::nullopt;
  }
  return Band();
}

template <typename T>
void run(const BlockSparse<T>& sparse) {
  const Attention<T>& call = sparse.call;
  if (auto band = band_of(sparse)) {
    Attention<T> dense = call;
    dense.band = *band;
    return run(dense);
  }
  if (call.queries <= kFewBlockRows && call.k_strides.column == 1 && call.v_strides.column == 1) return few_rows(sparse);
  if constexpr (std::is_same_v<T, BFloat16>)
    if (amx.load(std::memory_order_relaxed) && call.queries >= kFewestAmxRows) return run_as<T, true>(sparse);
  with_operand<T>([&](auto zero) { run_as<decltype(zero), false>(sparse); });
}

}  // namespace lissom
