// Linear layers of which whole blocks of the weight are zero: 4 neighbouring inputs of a panel of outputs.
//
// Only the other blocks are stored, panel after panel, each as a dense packed panel has it, with its place among the inputs. So a
// product takes as many steps as there are blocks. Vectors read x at those places. Tiles of AMX need their lines side by side: x is
// kept by 16 rows and four bytes, [rows / 16, bytes / 4, 16, 4], the lines of a panel's blocks are copied into a tile, and the
// weight is the left operand, so that sums come out transposed.
#pragma once

#include "linear.h"
#include "quantized.h"

namespace lissom {

constexpr int kBlockInputs = 4;

// The blocks that are stored.
struct StoredBlocks {
  const int32_t* places;  // [stored], in units of kBlockInputs inputs
  const int32_t* ends;    // [panels], the end of each panel's blocks

  int64_t first(int64_t panel) const { return panel ? ends[panel - 1] : 0; }
  int64_t count(int64_t panel) const { return ends[panel] - first(panel); }
};

// The blocks of a panel.
template <typename W>
struct OpenBlocks {
  const W* weight;  // [count, kBlockInputs / pair, kPanel, pair]
  const int32_t* places;
  int64_t count;
};

template <typename W>
inline OpenBlocks<W> open_blocks(const W* weight, const StoredBlocks& blocks, int64_t panel) {
  int64_t first = blocks.first(panel);
  return {weight + first * kBlockInputs * kPanel, blocks.places + first, blocks.count(panel)};
}

// sums[r][v] += R rows of a, `stride` apart, times column vectors v of the blocks [from, to).
template <int R, typename A, typename W, typename Sum>
inline __attribute__((always_inline)) void multiply_blocks(
    const A* a, int64_t stride, const OpenBlocks<W>& opened, int column, int64_t from, int64_t to, Sum (&sums)[R][kWide]) {
  constexpr int pair = kPair<W>, steps = kBlockInputs / pair;
  const W* b = opened.weight + from * kBlockInputs * kPanel + column * pair;
  for (int64_t block = from; block < to; ++block) {
    const A* rows[(R + 2) / 3];
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 3) rows[r / 3] = a + opened.places[block] * kBlockInputs + r * stride;
    __builtin_prefetch(reinterpret_cast<const char*>(b) + kAhead, 0, 2);
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step, b += kPanel * pair)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v)
          sums[r][v] = product(rows[r / 3] + (r % 3) * stride + step * pair, b + v * kLanes * pair, sums[r][v]);
  }
}

// x and W in floating point, of one dtype.
template <typename T>
struct SparsePlain {
  static constexpr bool kSharesRows = false;
  static constexpr int64_t kProductRows = 0, kFewRows = 0;
  using Scope = int;
  const T* x;       // [rows, inputs]
  const T* weight;
  StoredBlocks blocks;
  int64_t inputs;

  int64_t row_bytes() const { return inputs * sizeof(T); }
  void prepare(int64_t, int64_t) {}
  OpenBlocks<T> open(int64_t panel, int64_t) const { return open_blocks(weight, blocks, panel); }

  template <int R, bool fetches>
  void tile(const OpenBlocks<T>& opened, int64_t row, int64_t, int column, Vec (&sums)[R][kWide], bool) const {
    constexpr int64_t step = std::is_same_v<T, float> ? kDepth / kBlockInputs : std::numeric_limits<int64_t>::max();
    for (int64_t from = 0; from < opened.count; from += std::min(step, opened.count - from)) {
      Vec part[R][kWide] = {};
      multiply_blocks<R>(x + row * inputs, inputs, opened, column, from, from + std::min(step, opened.count - from), part);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kWide; ++v) sums[r][v] += part[r][v];
    }
  }
};

// x and W in bfloat16, multiplied in float32; W is widened in registers.
struct SparseWidened {
  static constexpr bool kSharesRows = false;
  static constexpr int64_t kProductRows = 0, kFewRows = 0;
  using Scope = int;
  const BFloat16* x;       // [rows, inputs]
  const BFloat16* weight;
  StoredBlocks blocks;
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
  OpenBlocks<BFloat16> open(int64_t panel, int64_t) const { return open_blocks(weight, blocks, panel); }

  template <int R, bool fetches>
  void tile(const OpenBlocks<BFloat16>& opened, int64_t row, int64_t, int column, Vec (&sums)[R][kWide], bool) const {
    const float* rows = floats + (row - origin) * inputs;
    for (int64_t block = 0; block < opened.count; ++block)
      multiply_widened<R>(rows + opened.places[block] * kBlockInputs, inputs,
                          opened.weight + block * kBlockInputs * kPanel + column * 2, kBlockInputs / 2, sums);
  }
};

// The int8 layer: x is quantized as for a dense weight.
template <typename T>
struct SparseQuantized : Quantized<T, false> {
  using Base = Quantized<T, false>;
  StoredBlocks blocks;

  OpenBlocks<int8_t> open(int64_t panel, int64_t) const { return open_blocks(this->weight, blocks, panel); }

  template <int R, bool fetches>
  void tile(const OpenBlocks<int8_t>& opened, int64_t row, int64_t panel, int column, Vec (&values)[R][kWide], bool) const {
    IntVec totals[R][kWide] = {};
    multiply_blocks<R>(this->elements.data() + (row - this->origin) * this->padded, this->padded, opened, column, 0, opened.count,
                       totals);
    this->dequantize(row, panel, column, totals, values);
  }
};

}  // namespace lissom
