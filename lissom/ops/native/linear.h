// y = activation(product + bias), then + other or * other, then perhaps a layer norm of each row.
//
// The product, x W^T, comes from a source, which defines the storage of x and W. A source has
//   prepare(begin, end)       called before tiles of rows [begin, end), by the same thread; or, where kSharesRows, by one thread
//                             for all that read the same rows
//   open(panel, rows)         the panel as tiles of that many rows read it
//   tile<R, fetches>(...)     R rows of one chunk of the panel's columns, in float32; `once`: no other tile reads the panel
//   product(...)              up to kProductRows rows of all the panel's columns; used for more than kFewRows rows, where
//                             kProductRows is not 0
//   row_bytes()               the bytes of one row of x
// and is copied for each thread that prepares its own rows.
#pragma once

#include "amx.h"
#include "rows.h"

#include <cmath>
#include <vector>

namespace lissom {

// Values in float32.
template <typename T>
inline void widen(const T* from, int64_t count, std::vector<float>& to) {
  to.resize(count);
  for (int64_t i = 0; i < count; i += kLanes) store_some(&to[i], load_some(from + i, count - i), count - i);
}

// x and W in floating point, of one dtype.
template <typename T>
struct Plain {
  static constexpr bool kSharesRows = false;
  static constexpr int64_t kProductRows = std::is_same_v<T, float> ? 8 * kRows : 0, kFewRows = kRows;
  using Scope = int;
  const T* x;       // [rows, inputs]
  const T* weight;  // packed, [panels, inputs / pair, kPanel, pair]
  int64_t inputs;

  int64_t row_bytes() const { return inputs * sizeof(T); }
  void prepare(int64_t, int64_t) {}
  const T* open(int64_t panel, int64_t) const { return weight + panel * inputs * kPanel; }

  template <int R, bool fetches>
  void tile(const T* opened, int64_t row, int64_t, int column, Vec (&sums)[R][kWide], bool once) const {
    multiply_in_parts<R, fetches>(x + row * inputs, inputs, opened + column * kPair<T>, sums, once);
  }

  void product(const T* opened, int64_t row, int64_t rows, int64_t, float* sums) const {
    multiply_parts<true>(x + row * inputs, inputs, rows, [&](int64_t from, int64_t) { return opened + from * kPanel; }, sums);
  }
};

// x and W in bfloat16, multiplied in float32: x is widened once, W in registers for few rows, else a part of a panel at a time.
struct Widened {
  static constexpr bool kSharesRows = false;  // widening again takes less time than lines of another core's cache
  static constexpr int64_t kProductRows = 8 * kRows, kFewRows = kRows;
  using Scope = int;
  const BFloat16* x;       // [rows, inputs]
  const BFloat16* weight;  // packed, [panels, inputs / 2, kPanel, 2]
  int64_t inputs;
  int64_t origin = 0;      // the first row of `floats`
  const float* floats = nullptr;  // x

  int64_t row_bytes() const { return inputs * sizeof(float); }

  void prepare(int64_t begin, int64_t end) {
    thread_local std::vector<float> widened;
    origin = begin;
    widen(x + begin * inputs, (end - begin) * inputs, widened);
    floats = widened.data();
  }

  const BFloat16* open(int64_t panel, int64_t) const { return weight + panel * inputs * kPanel; }

  template <int R, bool fetches>
  void tile(const BFloat16* opened, int64_t row, int64_t, int column, Vec (&sums)[R][kWide], bool) const {
    multiply_widened<R>(floats + (row - origin) * inputs, inputs, opened + column * 2, inputs / 2, sums);
  }

  void product(const BFloat16* opened, int64_t row, int64_t rows, int64_t, float* sums) const {
    alignas(64) float columns[kDepth * kPanel];
    auto widened = [&](int64_t from, int64_t depth) {
      widen_pairs(opened + from * kPanel, depth / 2, columns);
      return static_cast<const float*>(columns);
    };
    multiply_parts<false>(floats + (row - origin) * inputs, inputs, rows, widened, sums);
  }
};

template <typename Source>
constexpr bool kOnlyProducts = Source::kProductRows > 0 && Source::kFewRows == 0;

template <typename T>
struct Linear {
  const T* bias;       // [features], or null
  const T* other;      // [rows, features], or null
  T* y;                // [rows, features]
  int64_t rows, features;
  Activation activation;
  bool multiplies;     // multiply by other instead of adding it
  bool norms;
  RowNorm<T> norm;
};

// The epilogue of a vector of sums of one row, from column c on, without the bias.
template <typename T>
inline Vec finish(const Linear<T>& call, int64_t row, int64_t c, Vec value) {
  value = activate(call.activation, value);
  if (!call.other) return value;
  Vec other = load_some(call.other + row * call.features + c, call.features - c);
  return call.multiplies ? value * other : value + other;
}

// Computes rows [begin, end) of panels [first, last) into `to`, which has `features` columns and starts at row `origin`.
template <typename T, typename Source, typename Out>
inline void block_by_products(const Linear<T>& call, const Source& source, int64_t begin, int64_t end, int64_t first, int64_t last,
                              Out* to, int64_t origin) {
  alignas(64) float sums[Source::kProductRows * kPanel];
  int64_t n = call.features;
  [[maybe_unused]] typename Source::Scope scope(end - begin);
  for (int64_t panel = first; panel < last; ++panel) {
    auto opened = source.open(panel, end - begin);
    for (int64_t top = begin; top < end; top += Source::kProductRows) {
      int64_t rows = std::min<int64_t>(Source::kProductRows, end - top);
      source.product(opened, top, rows, panel, sums);
      for (int64_t c = panel * kPanel; c < std::min(n, (panel + 1) * kPanel); c += kLanes) {
        Vec bias = call.bias ? load_some(call.bias + c, n - c) : splat(0.0f);
        for (int64_t r = 0; r < rows; ++r) {
          Vec value = finish(call, top + r, c, load(sums + r * kPanel + c - panel * kPanel) + bias);
          store_some(to + (top + r - origin) * n + c, value, n - c);
        }
      }
    }
  }
}

template <typename T, typename Source, typename Out>
inline void block_by_vectors(const Linear<T>& call, const Source& source, int64_t begin, int64_t end, int64_t first, int64_t last,
                             Out* to, int64_t origin) {
  int64_t n = call.features;
  for (int64_t panel = first; panel < last; ++panel) {
    auto opened = source.open(panel, end - begin);
    in_pieces(begin, end, kRows, [&](int64_t top, int64_t bottom) {
      with_rows(static_cast<int>(bottom - top), [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (int column = 0; column < kPanel; column += kChunk) {
          Vec sums[R][kWide] = {};
          const bool once = end - begin <= kRows;
          if (bottom == end) source.template tile<R, true>(opened, top, panel, column, sums, once);
          else source.template tile<R, false>(opened, top, panel, column, sums, once);
#pragma GCC unroll 2
          for (int v = 0; v < kWide; ++v) {
            int64_t c = panel * kPanel + column + v * kLanes, left = n - c;
            if (left <= 0) break;
            Vec bias = call.bias ? load_some(call.bias + c, left) : splat(0.0f);
            if (call.activation == Activation::kNone && left >= kLanes && !call.other) {
#pragma GCC unroll 16
              for (int r = 0; r < R; ++r) store(to + (top + r - origin) * n + c, sums[r][v] + bias);
            } else {
              for (int r = 0; r < R; ++r)
                store_some(to + (top + r - origin) * n + c, finish(call, top + r, c, sums[r][v] + bias), left);
            }
          }
        }
      });
    });
  }
}

template <typename T, typename Source, typename Out>
inline void block(const Linear<T>& call, const Source& source, int64_t begin, int64_t end, int64_t first, int64_t last, Out* to,
                  int64_t origin) {
  if constexpr (Source::kProductRows > 0)
    if (end - begin > Source::kFewRows) return block_by_products(call, source, begin, end, first, last, to, origin);
  if constexpr (!kOnlyProducts<Source>)
    block_by_vectors(call, source, begin, end, first, last, to, origin);
}

constexpr int64_t kCached = 1 << 19;  // bytes of x that stay in the L2 cache while all panels are read
constexpr int64_t kMost = 8 * kRows;  // rows of a block: enough to amortize loading the weights, few enough to stay in the cache

template <typename T, typename Source>
void run(const Linear<T>& call, const Source& source) {
  int64_t threads = at::get_num_threads();
  int64_t panels = ceil_div(call.features, kPanel);
  int64_t most = std::min(std::max<int64_t>(kCached / std::max<int64_t>(source.row_bytes(), 1) / kRows, 2) * kRows, kMost);
  // Few rows: threads split the columns, so that each reads its part of the weights once. Many rows: they split the rows.
  int64_t across = call.rows < 3 * kRows * threads ? std::min(threads, panels) : 1;
  int64_t blocks = across > 1 ? ceil_div(call.rows, most) : ceil_div(ceil_div(call.rows, most), threads) * threads;
  auto start_of = [&](int64_t index) {  // a block's first row
    int64_t row = call.rows * index / blocks;
    return kOnlyProducts<Source> ? std::min(call.rows, ceil_div(row, kAmxRows) * kAmxRows) : row;
  };
  bool split_norm = call.norms && across > 1;
  std::vector<float> shared(split_norm ? call.rows * call.features : 0);
  Source whole = source;
  const bool shares = Source::kSharesRows && across > 1;
  if (shares) whole.prepare(0, call.rows);
  at::parallel_for(0, blocks * across, 1, [&](int64_t from, int64_t to) {
    std::vector<float> held;
    Source own = source;
    for (int64_t item = from; item < to; ++item) {
      int64_t part = item / blocks, index = item % blocks;
      int64_t begin = start_of(index), end = start_of(index + 1);
      int64_t first = panels * part / across, last = panels * (part + 1) / across;
      if (!shares) own.prepare(begin, end);
      const Source& mine = shares ? whole : own;
      if (split_norm) {
        block(call, mine, begin, end, first, last, shared.data(), 0);
      } else if (call.norms) {
        held.resize((end - begin) * call.features);
        block(call, mine, begin, end, first, last, held.data(), begin);
        for (int64_t row = begin; row < end; ++row)
          call.norm(held.data() + (row - begin) * call.features, call.y + row * call.features);
      } else {
        block(call, mine, begin, end, first, last, call.y, 0);
      }
    }
  });
  if (split_norm) {
    at::parallel_for(0, call.rows, most, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        call.norm(shared.data() + row * call.features, call.y + row * call.features);
    });
  }
}

}  // namespace lissom
