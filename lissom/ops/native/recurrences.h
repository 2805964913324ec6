// Recurrences over tokens: the gated delta rule and the selective scan, lissom/ops/recurrences.py.
//
// The columns of a state do not depend on each other, so a task takes a few columns through all tokens while they stay in the L1
// cache. A token then costs one pass over them: four multiply-adds a number, where products of chunks of tokens need more.
#pragma once

#include "vector.h"

#include <cmath>
#include <vector>

namespace lissom {

template <typename S>
struct LanesOf {
  typedef S type __attribute__((vector_size(kLanes * 4)));
};

constexpr int kSlices = 2;  // registers of columns
template <typename S>
constexpr int kLanesOf = kLanes * 4 / static_cast<int>(sizeof(S));
template <typename S>
constexpr int kColumns = kSlices * kLanesOf<S>;

// A row of columns of a state, or of values; with fewer columns than it has, the others are zero.
template <typename S>
struct Row {
  using V = typename LanesOf<S>::type;
  V slice[kSlices];

  static Row of(S value) {
    Row found{};
    for (V& slice : found.slice) slice = V{} + value;
    return found;
  }

  // Slice by slice: as a whole, GCC copies a row through the stack.
  static Row load(const S* from) {
    Row found;
    for (int i = 0; i < kSlices; ++i) std::memcpy(&found.slice[i], from + i * kLanesOf<S>, sizeof(V));
    return found;
  }

  void store(S* to) const {
    for (int i = 0; i < kSlices; ++i) std::memcpy(to + i * kLanesOf<S>, &slice[i], sizeof(V));
  }

  static Row load(const S* from, int64_t count) {
    if (count >= kColumns<S>) return load(from);
    S some[kColumns<S>] = {};
    std::copy(from, from + count, some);
    return load(some);
  }

  void store(S* to, int64_t count) const {
    if (count >= kColumns<S>) return store(to);
    S some[kColumns<S>];
    store(some);
    std::copy(some, some + count, to);
  }
};

template <typename S>
inline __attribute__((always_inline)) void add_product(Row<S>& sum, const Row<S>& row, S factor) {
#pragma GCC unroll 2
  for (int i = 0; i < kSlices; ++i) sum.slice[i] += row.slice[i] * factor;
}

template <typename S>
struct DeltaRule {
  const S *query, *key;       // [batch, tokens, key_heads, key_dim], prepared
  const S *value, *beta;      // [batch, tokens, heads, value_dim], [batch, tokens, heads]
  const S* decay;             // factors, [batch, tokens, heads] or [batch, tokens, heads, key_dim]
  S *state, *y;               // [batch, heads, key_dim, value_dim], read and written; like value
  int64_t batch, tokens, key_heads, heads, key_dim, value_dim;
  bool per_feature;
};

// Queries or keys divided by their lengths, if wanted, times a factor.
template <typename S>
void prepare_rows(const S* from, S* to, int64_t rows, int64_t n, bool normalizes, S factor) {
  for (int64_t row = 0; row < rows; ++row, from += n, to += n) {
    S total = 0;
    if (normalizes)
      for (int64_t i = 0; i < n; ++i) total += from[i] * from[i];
    S scale = normalizes ? factor / std::sqrt(total + S(1e-6)) : factor;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * scale;
  }
}

// Columns [first, first + count) of one head.
template <typename S>
void delta_rule_columns(const DeltaRule<S>& call, int64_t b, int64_t h, int64_t first, int64_t count) {
  int64_t n = call.key_dim, width = call.value_dim, shared = h / (call.heads / call.key_heads);
  thread_local std::vector<S> memory;
  memory.resize(n * kColumns<S>);
  S *held = memory.data(), *kept = call.state + (b * call.heads + h) * n * width + first;
  auto place = [&](int64_t t) { return (b * call.tokens + t) * call.heads + h; };
  auto keys = [&](const S* of, int64_t t) { return of + ((b * call.tokens + t) * call.key_heads + shared) * n; };
  auto decays = [&](int64_t t) { return call.decay + place(t) * (call.per_feature ? n : 1); };
  int64_t stride = call.per_feature;
  Row<S> known{};  // what the state holds for the key of the coming token
  for (int64_t i = 0; i < n; ++i) {
    Row<S> row = Row<S>::load(kept + i * width, count), decayed{};
    add_product(decayed, row, decays(0)[i * stride]);
    add_product(known, decayed, keys(call.key, 0)[i]);
    decayed.store(held + i * kColumns<S>);
  }
  for (int64_t t = 0; t < call.tokens; ++t) {
    const S *query = keys(call.query, t), *key = keys(call.key, t);
    bool last = t + 1 == call.tokens;
    const S *coming = last ? key : keys(call.key, t + 1), *decay = decays(last ? t : t + 1);
    Row<S> error = Row<S>::load(call.value + place(t) * width + first, count), found{}, next{};
    for (int i = 0; i < kSlices; ++i) error.slice[i] = (error.slice[i] - known.slice[i]) * call.beta[place(t)];
    if (last) {
      for (int64_t i = 0; i < n; ++i) {
        Row<S> row = Row<S>::load(held + i * kColumns<S>);
        add_product(row, error, key[i]);
        add_product(found, row, query[i]);
        row.store(kept + i * width, count);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        Row<S> row = Row<S>::load(held + i * kColumns<S>), decayed{};
        add_product(row, error, key[i]);
        add_product(found, row, query[i]);
        add_product(decayed, row, decay[i * stride]);
        add_product(next, decayed, coming[i]);
        decayed.store(held + i * kColumns<S>);
      }
    }
    found.store(call.y + place(t) * width + first, count);
    known = next;
  }
}

template <typename S>
void run(const DeltaRule<S>& call) {
  int64_t blocks = (call.value_dim + kColumns<S> - 1) / kColumns<S>;
  at::parallel_for(0, call.batch * call.heads * blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      int64_t first = task % blocks * kColumns<S>, head = task / blocks;
      delta_rule_columns(call, head / call.heads, head % call.heads, first, std::min<int64_t>(kColumns<S>, call.value_dim - first));
    }
  });
}

template <typename S>
struct Scan {
  const S *x, *step;    // [batch, tokens, heads, channels], [batch, tokens, heads]
  const S* a;           // [heads], or [heads, states] where there is one channel and one group
  const S *b, *c, *d;   // [batch, tokens, groups, states] twice, [heads] or null
  S *state, *y;         // [batch, heads, channels, states], read and written; like x
  int64_t batch, tokens, heads, channels, groups, states;
  bool per_state;
};

inline Row<float> powers(const Row<float>& of) {
  Row<float> found;
  for (int i = 0; i < kSlices; ++i) found.slice[i] = exponential(of.slice[i]);
  return found;
}

inline Row<double> powers(const Row<double>& of) {
  Row<double> found;
  for (int i = 0; i < kSlices; ++i)
    for (int lane = 0; lane < kLanesOf<double>; ++lane) found.slice[i][lane] = std::exp(of.slice[i][lane]);
  return found;
}

template <typename S>
inline Row<S> times(const Row<S>& one, const Row<S>& other) {
  Row<S> found;
  for (int i = 0; i < kSlices; ++i) found.slice[i] = one.slice[i] * other.slice[i];
  return found;
}

// Columns [first, first + count) of all heads' channels: of one head, or with a rate per state of several heads.
template <typename S, bool per_state>
void scan_columns(const Scan<S>& call, int64_t batch, int64_t first, int64_t count) {
  constexpr int columns = kColumns<S>;
  int64_t n = call.states, all = call.heads * call.channels, h = first / call.channels, group = h / (call.heads / call.groups);
  thread_local std::vector<S> memory;
  memory.resize(2 * n * columns);
  S *held = memory.data(), *rates = held + n * columns, *kept = call.state + (batch * all + first) * n;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t column = 0; column < columns; ++column) {
      held[i * columns + column] = column < count ? kept[column * n + i] : S(0);
      if (per_state) rates[i * columns + column] = column < count ? call.a[(first + column) * n + i] : S(0);
    }
  Row<S> weight = Row<S>::of(call.d && !per_state ? call.d[h] : S(0));
  if (call.d && per_state) weight = Row<S>::load(call.d + first, count);
  for (int64_t t = 0; t < call.tokens; ++t) {
    int64_t token = batch * call.tokens + t;
    const S *b = call.b + (token * call.groups + group) * n, *c = call.c + (token * call.groups + group) * n;
    Row<S> x = Row<S>::load(call.x + token * all + first, count), found = times(x, weight);
    Row<S> step = per_state ? Row<S>::load(call.step + token * call.heads + first, count) : Row<S>::of(call.step[token * call.heads + h]);
    Row<S> given = times(step, x);
    S forget = per_state ? S(0) : std::exp(call.step[token * call.heads + h] * call.a[h]);
    for (int64_t i = 0; i < n; ++i) {
      Row<S> row = Row<S>::load(held + i * columns), next{};
      if (per_state) next = times(row, powers(times(step, Row<S>::load(rates + i * columns))));
      else add_product(next, row, forget);
      add_product(next, given, b[i]);
      add_product(found, next, c[i]);
      next.store(held + i * columns);
    }
    found.store(call.y + token * all + first, count);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t column = 0; column < count; ++column) kept[column * n + i] = held[i * columns + column];
}

template <typename S>
void run(const Scan<S>& call) {
  int64_t wide = call.per_state ? call.heads : call.channels, heads = call.per_state ? 1 : call.heads;
  int64_t blocks = (wide + kColumns<S> - 1) / kColumns<S>;
  at::parallel_for(0, call.batch * heads * blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      int64_t start = task % blocks * kColumns<S>, first = task / blocks % heads * wide + start;
      int64_t count = std::min<int64_t>(kColumns<S>, wide - start);
      if (call.per_state) scan_columns<S, true>(call, task / blocks / heads, first, count);
      else scan_columns<S, false>(call, task / blocks / heads, first, count);
    }
  });
}

}  // namespace lissom
