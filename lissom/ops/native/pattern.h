// The keys visible to queries by a formula of their positions, the pattern of lissom/ops/pattern.py: the bounds of each condition
// decide for whole panels of keys, and only where they do not is each key tested.
#pragma once

#include "visible_keys.h"
#include "tile.h"

#include <vector>

namespace lissom {

// low <= query · ⌊i / unit⌋ + key · ⌊j / unit⌋ <= high, the sum modulo `modulus` unless that is 0.
struct Condition {
  int64_t query, key, low, high, unit, modulus;

  bool reads_layout() const { return query == 0 && key == 0; }
};

struct Pattern {
  std::vector<std::vector<Condition>> alternatives;
  int64_t block = 1;
  const bool* layout = nullptr;  // [heads or 1, rows, columns]
  int64_t heads = 1, rows = 0, columns = 0;

  const bool* layout_row(int64_t head, int64_t row) const {
    return layout + ((heads > 1 ? head : 0) * rows + std::min(row / block, rows - 1)) * columns;
  }
};

struct Bounds {
  bool some, whole;  // whether a condition may hold for some pair, and whether it holds for all
};

inline int64_t remainder_of(int64_t value, int64_t modulus) {
  int64_t rest = value % modulus;
  return rest < 0 ? rest + modulus : rest;
}

// The bounds of a condition for queries i and keys j, neither empty.
inline Bounds bounds_of(const Pattern& pattern, const Condition& condition, int64_t head, Span i, Span j) {
  if (condition.reads_layout()) {
    int64_t left = std::min(j.begin / pattern.block, pattern.columns - 1);
    int64_t right = std::min((j.end - 1) / pattern.block, pattern.columns - 1);
    Bounds found{false, true};
    for (int64_t row = i.begin; row < i.end; row = (row / pattern.block + 1) * pattern.block) {
      const bool* seen = pattern.layout_row(head, row);
      for (int64_t column = left; column <= right; ++column) found.some |= seen[column], found.whole &= seen[column];
    }
    return found;
  }
  int64_t low = 0, high = 0;
  auto add = [&](int64_t factor, Span span) {
    if (factor == 0) return;
    int64_t first = span.begin, last = span.end - 1;
    if (condition.unit > 1) first /= condition.unit, last /= condition.unit;
    low += factor > 0 ? first : -last, high += factor > 0 ? last : -first;
  };
  add(condition.query, i), add(condition.key, j);
  int64_t m = condition.modulus;
  if (m == 0) return {high >= condition.low && low <= condition.high, low >= condition.low && high <= condition.high};
  int64_t least = std::max<int64_t>(condition.low, 0), most = std::min(condition.high, m - 1);
  if (high - low >= m - 1) return {least <= most, least == 0 && most == m - 1};
  int64_t start = remainder_of(low, m), end = start + high - low;
  Bounds found{false, false};
  for (int64_t turn : {int64_t(0), m}) {  // a run of values past m - 1 wraps around to 0
    found.some |= start <= most + turn && end >= least + turn;
    found.whole |= start >= least + turn && end <= most + turn;
  }
  return found;
}

enum class Visibility : uint8_t { kNone, kPartial, kFull };

// How much of each panel of keys is visible to queries [i.begin, i.end) of one head.
class PanelVisibility {
 public:
  std::vector<Visibility> panels;
  std::vector<const std::vector<Condition>*> alternatives;  // the alternatives that may hold for these queries

  void find(const Pattern& pattern, int64_t head, Span i, int64_t keys) {
    panels.assign(ceil_div(keys, kPanel), Visibility::kNone);
    alternatives.clear();
    for (const auto& conditions : pattern.alternatives)
      if (add(pattern, conditions, head, i, keys)) alternatives.push_back(&conditions);
  }

 private:
  std::vector<const Condition*> open_;

  // A condition without modulus holds for an interval of keys; panels outside the intersection need no test.
  bool add(const Pattern& pattern, const std::vector<Condition>& conditions, int64_t head, Span i, int64_t keys) {
    Span some{0, keys}, whole{0, keys};
    open_.clear();
    for (const Condition& condition : conditions) {
      if (condition.reads_layout() || (condition.modulus && condition.key)) {
        open_.push_back(&condition);
      } else if (condition.key == 0) {
        Bounds found = bounds_of(pattern, condition, head, i, {0, 1});
        if (!found.some) return false;
        if (!found.whole) whole.end = 0;
      } else {
        int64_t first = condition.query * (i.begin / condition.unit), last = condition.query * ((i.end - 1) / condition.unit);
        auto [least, most] = std::minmax(first, last);
        narrow(some, condition, condition.low - most, condition.high - least);
        narrow(whole, condition, condition.low - least, condition.high - most);
      }
    }
    if (some.begin == some.end) return false;
    bool found = false;
    for (int64_t panel = some.begin / kPanel; panel * kPanel < some.end; ++panel) {
      Span j{panel * kPanel, std::min((panel + 1) * kPanel, keys)};
      bool may = true, must = whole.begin <= j.begin && j.end <= whole.end;
      for (size_t n = 0; n < open_.size() && may; ++n) {
        Bounds bounds = bounds_of(pattern, *open_[n], head, i, j);
        may = bounds.some, must &= bounds.whole;
      }
      if (!may) continue;
      found = true;
      panels[panel] = std::max(panels[panel], must ? Visibility::kFull : Visibility::kPartial);
    }
    return found;
  }

  // Narrows the span to the keys j with low <= key · ⌊j / unit⌋ <= high.
  static void narrow(Span& span, const Condition& condition, int64_t low, int64_t high) {
    int64_t first = condition.key > 0 ? low : -high, last = condition.key > 0 ? high : -low;
    if (first > 0) span.begin = std::max(span.begin, first > span.end ? span.end : first * condition.unit);
    if (last < 0) span.end = span.begin;
    else if (last < span.end) span.end = std::min(span.end, (last + 1) * condition.unit);
    span.begin = std::min(span.begin, span.end);
  }
};

// Tests single keys of one panel: the conditions that the bounds left undecided.
class PanelTest {
 public:
  Visibility prepare(const Pattern& pattern, const PanelVisibility& visibility, int64_t head, Span i, Span j) {
    pattern_ = &pattern, head_ = head, begin_ = j.begin;
    checks_.clear();
    bool found = false;
    for (const auto* conditions : visibility.alternatives) {
      size_t before = checks_.size();
      bool may = true;
      for (size_t n = 0; n < conditions->size() && may; ++n) {
        Bounds bounds = bounds_of(pattern, (*conditions)[n], head, i, j);
        may = bounds.some;
        if (may && !bounds.whole) checks_.push_back(check_of((*conditions)[n]));
      }
      if (!may) {
        checks_.resize(before);
        continue;
      }
      if (checks_.size() == before) return Visibility::kFull;
      checks_.back().last = true;
      found = true;
    }
    return found ? Visibility::kPartial : Visibility::kNone;
  }

  // Prepares the test for one query; operator() then gives -1 for each visible key of some lanes, and 0 for the others.
  void start(int64_t row) {
    for (Check& check : checks_) {
      const Condition& condition = *check.condition;
      if (condition.reads_layout()) {
        const bool* seen = pattern_->layout_row(head_, row);
        if (seen == check.seen) continue;
        check.seen = seen;
        for (int lane = 0; lane < kPanel; ++lane)
          check.lanes[lane] = -int32_t(seen[std::min((begin_ + lane) / pattern_->block, pattern_->columns - 1)]);
      } else {
        check.row = static_cast<int32_t>(condition.query * (row / condition.unit));
        if (condition.modulus) check.row = static_cast<int32_t>(remainder_of(check.row, condition.modulus));
      }
    }
  }

  IntVec operator()(int64_t column) const {
    IntVec seen{}, all = ~seen;
    for (const Check& check : checks_) {
      IntVec value;
      std::memcpy(&value, check.lanes + column, sizeof value);
      if (check.condition->reads_layout()) {
        all &= value;
      } else {
        value += check.row;
        if (check.modulus) value = value >= check.modulus ? value - check.modulus : value;
        all &= (IntVec)(value >= check.low) & (IntVec)(value <= check.high);
      }
      if (check.last) seen |= all, all = ~IntVec{};
    }
    return seen;
  }

 private:
  struct Check {
    const Condition* condition;
    const bool* seen = nullptr;  // the row of the layout that the lanes were filled from
    bool last = false;           // of its alternative
    int32_t row = 0, low, high, modulus, lanes[kPanel];
  };

  Check check_of(const Condition& condition) const {
    Check check{&condition};
    check.low = static_cast<int32_t>(condition.low), check.high = static_cast<int32_t>(condition.high);
    check.modulus = static_cast<int32_t>(condition.modulus);
    if (condition.reads_layout()) return check;
    for (int lane = 0; lane < kPanel; ++lane) {
      int64_t value = condition.key * ((begin_ + lane) / condition.unit);
      check.lanes[lane] = static_cast<int32_t>(condition.modulus ? remainder_of(value, condition.modulus) : value);
    }
    return check;
  }

  const Pattern* pattern_ = nullptr;
  int64_t head_ = 0, begin_ = 0;
  std::vector<Check> checks_;
};

}  // namespace lissom
