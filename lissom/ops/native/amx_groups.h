// Products of x with a scale for each group by Intel's AMX: a tile holds one group of x, the integer sums of some groups are stored,
// and added in float32 with their scales, in the order and with the numbers of GroupQuantized.
#pragma once

#include "amx.h"
#include "quantized.h"

namespace lissom {

// For fewer rows vectors take less time: tiles take as long for one row as for 16.
constexpr int64_t kFewestAmxGroupRows = 9;

template <typename T, int bits, bool shifts>
struct TiledGroups : GroupQuantized<T, bits, true, shifts> {
  using Base = GroupQuantized<T, bits, true, shifts>;
  using Scope = TileScope<kGroup>;
  static constexpr int64_t kProductRows = kAmxRows, kFewRows = 0;
  static constexpr int64_t kSteps = kGroup / 4, kGroupBytes = kSteps * kPanelBytes;  // of a group's weights as bytes
  static constexpr int64_t kTogether = 2;                                            // groups between two visits of the sums
  using Totals = int32_t[kAmxRows][kPanel];                                          // of a group

  // Rows [row, row + rows) times the panel, at most kAmxRows, into `sums`, [kAmxRows, kPanel]. Stored tiles are read one step later,
  // and weights multiplied one step after they are decoded, since tiles do not take values that are still being stored.
  void product(const int8_t* opened, int64_t row, int64_t rows, int64_t panel, float* sums) const {
    alignas(64) int8_t decoded[2][bits == 4 ? kTogether * kGroupBytes : 1];
    alignas(64) Totals totals[2][kTogether];
    const int64_t count = this->parts(), steps = ceil_div(count, kTogether);
    auto groups_of = [&](int64_t step) { return std::min(kTogether, count - step * kTogether); };
    auto weights = [&](int64_t step) { return opened + step * kTogether * kSteps * Base::kStepBytes; };
    auto open_step = [&](int64_t step) {
      const int8_t* ahead = weights(step) + kAhead;
      for (int64_t i = 0; i < kTogether * kSteps * Base::kStepBytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      if constexpr (bits == 4)
        if (step < steps) decode(weights(step), groups_of(step) * kSteps, decoded[step % 2]);
    };
    std::fill(sums, sums + rows * kPanel, 0.0f);
    open_step(0);
    for (int64_t step = 0; step <= steps; ++step) {
      open_step(step + 1);
      if (step < steps) {
        const Element* a = this->elements.data() + (row - this->origin) * this->inputs + step * kTogether * kGroup;
        const int8_t* b = bits == 4 ? decoded[step % 2] : weights(step);
        for (int64_t g = 0; g < groups_of(step); ++g, a += kGroup, b += kGroupBytes) {
          const AmxPanel group{reinterpret_cast<const char*>(b), 1, nullptr};
          amx_product<int8_t>(rows, a, this->inputs, group, totals[step % 2][g], kPanelBytes);
        }
      }
      if (step == 0) continue;
      const int64_t part = (step - 1) * kTogether, n = groups_of(step - 1);
      const Totals* before = totals[(step - 1) % 2];
      if (n == kTogether) add<kTogether>(before, part, row, rows, panel, sums);
      else add<1>(before, part, row, rows, panel, sums);
    }
  }

 private:
  // Adds the totals of groups [part, part + n).
  template <int64_t n>
  void add(const Totals* totals, int64_t part, int64_t row, int64_t rows, int64_t panel, float* sums) const {
    const int64_t count = this->parts(), first = row - this->origin;
    int64_t places[n];  // of the first column's scales
    for (int64_t g = 0; g < n; ++g)
      places[g] = place_of(count == this->groups ? part + g : (part + g) * this->groups / count, this->groups, panel * kPanel);
    for (int column = 0; column < kPanel; column += kLanes) {
      Vec scale[n], zero[n];
      for (int64_t g = 0; g < n; ++g) {
        scale[g] = load_floats(this->group_scale, this->half, places[g] + column);
        if constexpr (shifts) zero[g] = load(this->zero_point + places[g] + column);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (first + r) * count + part;
        Vec sum = load(sums + r * kPanel + column);
#pragma GCC unroll 2
        for (int64_t g = 0; g < n; ++g) {
          IntVec total;
          std::memcpy(&total, &totals[g][r][column], sizeof total);
          if constexpr (bits == 4 && !shifts) total -= this->middles[place + g];
          Vec value = to_floats(total);
          if constexpr (shifts) value = multiply_add(-zero[g], splat(this->middles[place + g]), value);
          sum = multiply_add(value, scale[g] * this->scales[place + g], sum);
        }
        store(sums + r * kPanel + column, sum);
      }
    }
  }

  // Elements of four bits as bytes: those with zero points from 0 to 15, others plus kInt4Middle.
  static void decode(const int8_t* from, int64_t steps, int8_t* to) {
    constexpr uint64_t low = 0x0f0f0f0f0f0f0f0f, middle = shifts ? 0 : kInt4Middle * 0x0101010101010101;
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t i = 0; i < kPanelBytes / 2; i += 8) {
        uint64_t both;
        std::memcpy(&both, from + step * (kPanelBytes / 2) + i, sizeof both);
        uint64_t first = (both & low) ^ middle, second = ((both >> 4) & low) ^ middle;
        std::memcpy(to + step * kPanelBytes + i, &first, sizeof first);
        std::memcpy(to + step * kPanelBytes + kPanelBytes / 2 + i, &second, sizeof second);
      }
  }
};

}  // namespace lissom
