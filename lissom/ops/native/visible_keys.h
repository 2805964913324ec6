// The keys that are visible to each query of an attention, as ranges: few slots of a KV cache may be filled, and a sliding window
// hides the old ones.
#pragma once

#include "vector.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace lissom {

struct Span {
  int64_t begin, end;  // the first visible key, and one past the last; equal when none is visible
};

// Query i sees keys i + low to i + high.
struct Band {
  static constexpr int64_t kFar = int64_t(1) << 40;
  int64_t low = -kFar, high = kFar;

  static Band causal() { return {-kFar, 0}; }
  Band after(int64_t queries) const { return {low + queries, high + queries}; }  // of the queries that follow these
  bool narrows() const { return low > -kFar || high < kFar; }
  Span of(int64_t row, int64_t keys) const {
    int64_t begin = std::clamp<int64_t>(row + low, 0, keys);
    return {begin, std::clamp<int64_t>(row + high + 1, begin, keys)};
  }
};

inline Span joined(Span a, Span b) {
  if (a.begin == a.end) return b;
  if (b.begin == b.end) return a;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}

// A bias below this hides the key: after softmax its weight is 0 in a row with any visible key.
constexpr float kLowestBias = -1e30f;

inline Span span_of(const bool* seen, int64_t stride, int64_t keys) {
  if (stride == 0) return {0, *seen ? keys : 0};
  int64_t begin = 0, end = keys;
  if (stride == 1) {
    const void* first = std::memchr(seen, 1, keys);
    if (!first) return {0, 0};
    begin = static_cast<const bool*>(first) - seen;
  } else {
    while (begin < end && !seen[begin * stride]) ++begin;
  }
  constexpr int64_t kWord = sizeof(uint64_t);
  for (uint64_t word = 0; stride == 1 && end - begin >= kWord; end -= kWord) {
    std::memcpy(&word, seen + end - kWord, kWord);
    if (word) break;
  }
  while (end > begin && !seen[(end - 1) * stride]) --end;
  return {begin, end};
}

// In a row whose every bias is below kLowestBias, and not all minus infinity, all keys are visible.
inline Span span_of(const float* bias, int64_t stride, int64_t keys) {
  int64_t begin = 0, end = keys;
  while (begin < end && bias[begin * stride] < kLowestBias) ++begin;
  if (begin == end) {
    bool hidden = true;
    for (int64_t key = 0; key < keys && hidden; ++key) hidden = bias[key * stride] == -std::numeric_limits<float>::infinity();
    return {0, hidden ? 0 : keys};
  }
  while (bias[(end - 1) * stride] < kLowestBias) --end;
  return {begin, end};
}

// The visible spans of all rows; stored once for all heads or queries where the mask is broadcast along them.
class VisibleKeys {
 public:
  template <typename Call>
  explicit VisibleKeys(const Call& call) : keys_(call.keys), band_(call.band) {
    if (!call.bias && !call.mask) return;
    const auto& strides = call.bias_strides;
    heads_ = strides.head ? call.heads : 1;
    // Whether all biases of a row are below kLowestBias depends on the keys that the band leaves it.
    bool limited = call.bias && band_.narrows();
    queries_ = strides.row || limited ? call.queries : 1;
    int64_t batches = strides.batch ? call.batch : 1;
    per_batch_ = strides.batch ? heads_ * queries_ : 0;
    spans_.reserve(batches * heads_ * queries_);
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t h = 0; h < heads_; ++h)
        for (int64_t row = 0; row < queries_; ++row) {
          Span left = limited ? band_.of(row, call.keys) : Span{0, call.keys};
          int64_t offset = strides.at(b, h, row) + left.begin * strides.column, keys = left.end - left.begin;
          Span found = call.mask ? span_of(call.mask + offset, strides.column, keys)
                                 : span_of(call.bias + offset, strides.column, keys);
          spans_.push_back({left.begin + found.begin, left.begin + found.end});
        }
  }

  Span of(int64_t b, int64_t h, int64_t row) const {
    Span found{0, keys_};
    row += first_;
    if (!spans_.empty()) {
      int64_t head = heads_ > 1 ? h : 0, query = queries_ > 1 ? row : 0;
      found = spans_[b * per_batch_ + head * queries_ + query];
    }
    Span left = band_.of(row, keys_);
    found = {std::max(found.begin, left.begin), std::min(found.end, left.end)};
    // An empty span is {0, 0}: memory is allocated from the first to the last key that any row sees.
    return found.begin < found.end ? found : Span{0, 0};
  }

  Span of(int64_t b, int64_t h, int64_t begin, int64_t end) const {
    Span found{0, 0};
    for (int64_t row = begin; row < end; ++row) found = joined(found, of(b, h, row));
    return found;
  }

  // Those of the queries that follow so many.
  VisibleKeys after(int64_t rows) const {
    VisibleKeys found(*this);
    found.first_ += rows;
    return found;
  }

  // One past the last of the queries from `begin` on whose keys lie together: more than `hole` keys that none of them sees end these.
  int64_t end_of_neighbours(int64_t begin, int64_t end, int64_t hole) const {
    Span whole = of(0, 0, begin);
    for (++begin; begin < end; ++begin) {
      Span next = of(0, 0, begin), both = joined(whole, next);
      if (both.end - both.begin > whole.end - whole.begin + next.end - next.begin + hole) break;
      whole = both;
    }
    return begin;
  }

 private:
  int64_t keys_, heads_ = 1, queries_ = 1, per_batch_ = 0, first_ = 0;
  Band band_;
  std::vector<Span> spans_;
};

}  // namespace lissom
