// Weight-only quantized linear layers by Intel's AMX, for weights with scales of 32 inputs or a multiple: elements of all formats are
// numbers of bfloat16 before they are scaled, and x in float32 is the sum of three, so products are exact, and summed in float32.
#pragma once

#include "amx.h"
#include "weight_quantized.h"

namespace lissom {

// For fewer rows weights are dequantized in registers: tiles take as long for one row as for 16.
constexpr int64_t kFewestAmxWeightRows = 5;

template <typename T>
struct TiledWeights {
  static constexpr bool kSharesRows = true;
  static constexpr int64_t kProductRows = kAmxRows, kFewRows = 0;
  static constexpr int kTerms = std::is_same_v<T, float> ? 3 : 1;  // of bfloat16, whose sum is x
  using Scope = AmxScope;
  using Decoded = BFloat16[kInTile / 2][kPanel][2];
  using Totals = float[kAmxRows][kPanel];
  const T* x;  // [rows, inputs]
  QuantizedWeight weight;
  int64_t origin = 0, held = 0;   // the first row of `terms` and `sums`, and the number of rows in whole tiles
  std::vector<BFloat16> terms{};  // [inputs / kInTile, kTerms, held, kInTile]
  std::vector<float> sums{};      // of x per group, [rows, groups], where there are zero points

  // Whether this is how a product is computed: with more rows in bfloat16 dequantizing a whole panel once takes less time.
  static bool fits(const QuantizedWeight& weight, int64_t rows) {
    return weight.groups > 0 && weight.inputs / weight.groups % kInTile == 0 && (std::is_same_v<T, float> || rows <= kAmxRows);
  }
  int64_t row_bytes() const { return weight.inputs * sizeof(T); }
  int64_t group() const { return weight.inputs / weight.groups; }

  void prepare(int64_t begin, int64_t end) {
    origin = begin, held = ceil_div(end - begin, kTileRows) * kTileRows;
    terms.assign(kTerms * held * weight.inputs, BFloat16(0));
    for (int64_t row = 0; row < end - begin; ++row)
      for (int64_t i = 0; i < weight.inputs; ++i) {
        float left = static_cast<float>(x[(begin + row) * weight.inputs + i]);
        BFloat16* to = terms.data() + (i / kInTile * kTerms * held + row) * kInTile + i % kInTile;
        for (int term = 0; term < kTerms && std::isfinite(left); ++term, to += held * kInTile) {
          *to = BFloat16(left);
          left -= static_cast<float>(*to);
        }
        if (!std::isfinite(left)) *to = BFloat16(left);
      }
    if (!weight.has_zeros()) return;
    group_sums(x + begin * weight.inputs, (end - begin) * weight.groups, group(), sums);
  }

  int64_t open(int64_t panel, int64_t) const { return panel; }

  // Rows [row, row + rows) times the panel, at most kAmxRows, into `to`, [kAmxRows, kPanel]. Stored tiles are read one group later,
  // and weights multiplied one step after they are decoded, since tiles do not take values that are still being stored.
  void product(int64_t, int64_t row, int64_t rows, int64_t panel, float* to) const {
    with_form(weight.form, [&](auto form) { product_of<decltype(form)::value>(row, rows, panel, to); });
  }

 private:
  template <Form form>
  void product_of(int64_t row, int64_t rows, int64_t panel, float* to) const {
    alignas(64) Decoded decoded[2];
    alignas(64) Totals totals[2];
    const Decoder<form> decoder;
    const int64_t steps = weight.inputs / kInTile, in_group = group() / kInTile;
    auto decode_step = [&](int64_t step) {
      if (step < steps) decode(decoder, weight.panel(panel) + step * kInTile * step_bytes(form), decoded[step % 2]);
    };
    std::fill(to, to + rows * kPanel, 0.0f);
    decode_step(0);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t index = step / in_group;
      decode_step(step + 1);
      const BFloat16* a = terms.data() + (step * kTerms * held + row - origin) * kInTile;
      const bool first = step % in_group == 0, last = (step + 1) % in_group == 0;
      if (rows > kTileRows) multiply<true>(a, first, last, decoded[step % 2], totals[index % 2]);
      else multiply<false>(a, first, last, decoded[step % 2], totals[index % 2]);
      if (last && index > 0) add(totals[(index - 1) % 2], index - 1, row, rows, panel, to);
    }
    if (steps > 0) add(totals[(weight.groups - 1) % 2], weight.groups - 1, row, rows, panel, to);
  }

  // Adds 16 or 32 rows of x times a panel, of kInTile inputs, to the tiles of sums, which are stored after the last of a group.
  template <bool two>
  void multiply(const BFloat16* a, bool first, bool last, const Decoded& decoded, Totals& totals) const {
    const char* b = reinterpret_cast<const char*>(decoded);
    asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    if (first) {
      LISSOM_TILE_ZERO(0);
      LISSOM_TILE_ZERO(1);
      if constexpr (two) {
        LISSOM_TILE_ZERO(2);
        LISSOM_TILE_ZERO(3);
      }
    }
    LISSOM_TILE_LOAD(6, b, kPanelBytes);
    LISSOM_TILE_LOAD(7, b + kTileBytes, kPanelBytes);
    for (int term = 0; term < kTerms; ++term, a += held * kInTile) {
      LISSOM_TILE_LOAD(4, a, kTileBytes);
      LISSOM_TILE_DOT(BFloat16, 0, 4, 6);
      LISSOM_TILE_DOT(BFloat16, 1, 4, 7);
      if constexpr (two) {
        LISSOM_TILE_LOAD(5, a + kTileRows * kInTile, kTileBytes);
        LISSOM_TILE_DOT(BFloat16, 2, 5, 6);
        LISSOM_TILE_DOT(BFloat16, 3, 5, 7);
      }
    }
    if (last) {
      LISSOM_TILE_STORE(0, totals[0], kPanelBytes);
      LISSOM_TILE_STORE(1, totals[0] + kPanel / 2, kPanelBytes);
      if constexpr (two) {
        LISSOM_TILE_STORE(2, totals[kTileRows], kPanelBytes);
        LISSOM_TILE_STORE(3, totals[kTileRows] + kPanel / 2, kPanelBytes);
      }
    }
    asm volatile("" ::: "memory");
  }

  // Adds the totals of a group with its scales and zero points.
  void add(const Totals& totals, int64_t index, int64_t row, int64_t rows, int64_t panel, float* to) const {
    if (weight.shift) add_of<true, true>(totals, index, row, rows, panel, to);
    else if (weight.zero) add_of<true, false>(totals, index, row, rows, panel, to);
    else add_of<false, false>(totals, index, row, rows, panel, to);
  }

  template <bool zeros, bool shifts>
  void add_of(const Totals& totals, int64_t index, int64_t row, int64_t rows, int64_t panel, float* to) const {
    const float* inputs = zeros ? sums.data() + (row - origin) * weight.groups + index : nullptr;
    for (int column = 0; column < kPanel; column += kLanes) {
      const int64_t c = panel * kPanel + column;
      const Vec scale = weight.scales(index, c), zero = weight.zeros(index, c), shift = weight.shifts(index, c);
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) {
        Vec total = load(totals[r] + column), sum = load(to + r * kPanel + column);
        if constexpr (zeros) total -= zero * inputs[r * weight.groups];
        if constexpr (shifts) sum -= shift * inputs[r * weight.groups];
        store(to + r * kPanel + column, sum + total * scale);
      }
    }
  }

  // The elements of kInTile inputs, before zero point and scale.
  template <Form form>
  static void decode(const Decoder<form>& decoder, const uint8_t* from, Decoded& to) {
    for (int64_t i = 0; i < kInTile; i += 2, from += 2 * step_bytes(form)) {
      __builtin_prefetch(from + kAhead, 0, 2);
#if defined(__AVX512BW__)
      if constexpr (bits_of(form) == 4) {
        decoder.pairs_of_four_bits(from, to[i / 2][0]);
        continue;
      }
#endif
      for (int column = 0; column < kPanel; column += kChunk) {
        Vec found[2][kWide];
        decoder(from, column, found[0]);
        decoder(from + step_bytes(form), column, found[1]);
        for (int v = 0; v < kWide; ++v) store_pairs(to[i / 2][column + v * kLanes], found[0][v], found[1][v]);
      }
    }
  }
};

}  // namespace lissom
