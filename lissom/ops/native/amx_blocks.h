// Products by tiles with a weight of which whole blocks are zero; see block_sparse_linear.h.
#pragma once

#include "block_sparse_linear.h"

namespace lissom {

constexpr int64_t kBytesOfTile = kTileRows * kTileBytes;  // bytes of a whole tile
constexpr int64_t kFewestAmxBlockRows = 96;            // for fewer rows the weight's tiles are not transposed: vectors are faster
constexpr int kWords = kTileBytes / 4;             // 32-bit words of a row of a tile

// Transposes 16 rows of 16 words.
inline void transpose_words(const char* from, int64_t stride, char* to, int64_t to_stride) {
#if defined(__AVX512F__)
  for (int g = 0; g < 4; ++g, from += 16) {
    __m512 rows[4];
    for (int i = 0; i < 4; ++i) {
      auto four = [&](int row) { return _mm_loadu_ps(reinterpret_cast<const float*>(from + row * stride)); };
      __m512 found = _mm512_castps128_ps512(four(i));
      found = _mm512_insertf32x4(found, four(i + 4), 1);
      found = _mm512_insertf32x4(found, four(i + 8), 2);
      rows[i] = _mm512_insertf32x4(found, four(i + 12), 3);
    }
    __m512d low[2], high[2];
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]));
      high[i] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    __m512d columns[4] = {_mm512_unpacklo_pd(low[0], low[1]), _mm512_unpackhi_pd(low[0], low[1]),
                          _mm512_unpacklo_pd(high[0], high[1]), _mm512_unpackhi_pd(high[0], high[1])};
    for (int c = 0; c < 4; ++c) _mm512_storeu_pd(to + (4 * g + c) * to_stride, columns[c]);
  }
#else
  for (int row = 0; row < kTileRows; ++row)
    for (int word = 0; word < kWords; ++word) std::memcpy(to + word * to_stride + 4 * row, from + row * stride + 4 * word, 4);
#endif
}

// x as tiles read it: [rows / 16, lines, 16, 4 bytes].
struct Lines {
  int64_t origin = 0, count = 0;  // the first row, and lines of a row
  std::vector<char> bytes{};

  // write(row, to): the row as `count` words.
  template <typename Write>
  void prepare(int64_t begin, int64_t end, int64_t words, Write&& write) {
    const int64_t groups = ceil_div(end - begin, kTileRows), width = ceil_div(words, kWords) * kTileBytes;
    origin = begin, count = width / 4;
    bytes.resize(groups * kTileRows * width);
    at::parallel_for(0, groups, ceil_div(kQuantizationGrain, std::max<int64_t>(width * kTileRows, 1)), [&](int64_t from, int64_t to) {
      std::vector<char> rows(kTileRows * width, 0);
      for (int64_t group = from; group < to; ++group) {
        const int64_t first = begin + group * kTileRows, some = std::min<int64_t>(kTileRows, end - first);
        for (int64_t r = 0; r < some; ++r) write(first + r, rows.data() + r * width);
        std::fill(rows.begin() + some * width, rows.end(), 0);
        for (int64_t at = 0; at < width; at += kTileBytes)
          transpose_words(rows.data() + at, width, bytes.data() + (group * count + at / 4) * kTileBytes, kTileBytes);
      }
    });
  }

  const char* group(int64_t row) const { return bytes.data() + (row - origin) / kTileRows * count * kTileBytes; }
};

// The blocks of a panel as left operands: for each tile of lines two tiles of 16 outputs, filled up with zeros.
struct OpenTiles {
  const char* tiles;
  const int32_t* places;
  int64_t count;
};

template <typename W>
inline OpenTiles open_tiles(const W* weight, const StoredBlocks& blocks, int64_t panel, std::vector<char>& kept) {
  OpenBlocks<W> opened = open_blocks(weight, blocks, panel);
  const int64_t lines = opened.count * sizeof(W), tiles = ceil_div(lines, kWords);
  const char* from = reinterpret_cast<const char*>(opened.weight);
  kept.resize(tiles * 2 * kBytesOfTile);
  alignas(64) char rest[kTileRows * kPanelBytes];
  for (int64_t tile = 0; tile < tiles; ++tile, from += kWords * kPanelBytes) {
    const char* source = from;
    if (int64_t left = lines - tile * kWords; left < kWords) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, from, left * kPanelBytes);
      source = rest;
    }
    for (int half = 0; half < 2; ++half)
      transpose_words(source + half * kTileBytes, kPanelBytes, kept.data() + (2 * tile + half) * kBytesOfTile, kTileBytes);
  }
  return {kept.data(), opened.places, opened.count};
}

// out, [16 or 32, kPanel] of words, = the rows times the panel.  T: BFloat16, or WeightFirst for bytes.
template <typename T, bool two>
inline void blocks_product(const Lines& x, int64_t row, const OpenTiles& opened, float* out) {
  constexpr int each = std::is_same_v<T, BFloat16> ? 2 : 1, in_tile = kWords / each;  // lines of a block, and blocks of a tile
  alignas(64) char gathered[2][2][kBytesOfTile], sums[4][kBytesOfTile];
  const char* groups[2] = {x.group(row), two ? x.group(row + kTileRows) : nullptr};
  LISSOM_TILE_ZERO(0);
  LISSOM_TILE_ZERO(1);
  LISSOM_TILE_ZERO(2);
  LISSOM_TILE_ZERO(3);
  const char* a = opened.tiles;
  for (int64_t first = 0, turn = 0; first < opened.count; first += in_tile, turn ^= 1, a += 2 * kBytesOfTile) {
    const int64_t some = std::min<int64_t>(in_tile, opened.count - first);
    for (int half = 0; half <= two; ++half) {
      char* to = gathered[turn][half];
      for (int64_t block = 0; block < some; ++block, to += each * kTileBytes)
        std::memcpy(to, groups[half] + opened.places[first + block] * each * kTileBytes, each * kTileBytes);
      if (some < in_tile) std::memset(to, 0, (in_tile - some) * each * kTileBytes);  // zeros times NaN are not zero
    }
    asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    LISSOM_TILE_LOAD(4, a, kTileBytes);
    LISSOM_TILE_LOAD(5, a + kBytesOfTile, kTileBytes);
    LISSOM_TILE_LOAD(6, gathered[turn][0], kTileBytes);
    LISSOM_TILE_DOT(T, 0, 4, 6);
    LISSOM_TILE_DOT(T, 2, 5, 6);
    if constexpr (two) {
      LISSOM_TILE_LOAD(7, gathered[turn][1], kTileBytes);
      LISSOM_TILE_DOT(T, 1, 4, 7);
      LISSOM_TILE_DOT(T, 3, 5, 7);
    }
  }
  LISSOM_TILE_STORE(0, sums[0], kTileBytes);
  LISSOM_TILE_STORE(2, sums[2], kTileBytes);
  if constexpr (two) {
    LISSOM_TILE_STORE(1, sums[1], kTileBytes);
    LISSOM_TILE_STORE(3, sums[3], kTileBytes);
  }
  asm volatile("" ::: "memory");
  char* to = reinterpret_cast<char*>(out);
  for (int half = 0; half <= two; ++half)
    for (int outputs = 0; outputs < 2; ++outputs)
      transpose_words(sums[2 * outputs + half], kTileBytes, to + half * kTileRows * kPanelBytes + outputs * kTileBytes, kPanelBytes);
}

template <typename T>
inline void blocks_product(const Lines& x, int64_t row, int64_t rows, const OpenTiles& opened, float* out) {
  if (rows > kTileRows) blocks_product<T, true>(x, row, opened, out);
  else blocks_product<T, false>(x, row, opened, out);
}

struct BlocksScope : AmxScope {
  explicit BlocksScope(int64_t) : AmxScope(kTileRows) {}  // the left operand is always whole
};

// SparsePlain of bfloat16, by tiles.
struct TiledBlocks {
  static constexpr bool kSharesRows = true;
  static constexpr int64_t kProductRows = kAmxRows, kFewRows = 0;
  using Scope = BlocksScope;
  const BFloat16* x;       // [rows, inputs]
  const BFloat16* weight;
  StoredBlocks blocks;
  int64_t inputs;
  Lines lines{};

  int64_t row_bytes() const { return inputs * sizeof(BFloat16); }

  void prepare(int64_t begin, int64_t end) {
    lines.prepare(begin, end, inputs / 2, [&](int64_t row, char* to) { std::memcpy(to, x + row * inputs, row_bytes()); });
  }

  OpenTiles open(int64_t panel, int64_t) const {
    thread_local std::vector<char> kept;
    return open_tiles(weight, blocks, panel, kept);
  }

  void product(const OpenTiles& opened, int64_t row, int64_t rows, int64_t, float* sums) const {
    blocks_product<BFloat16>(lines, row, rows, opened, sums);
  }
};

// SparseQuantized by tiles, where an element is a byte.
template <typename T>
struct TiledQuantizedBlocks : Quantized<T, true> {
  using Base = Quantized<T, true>;
  using Scope = BlocksScope;
  StoredBlocks blocks;
  Lines lines{};

  void prepare(int64_t begin, int64_t end) {
    this->origin = begin;
    this->quantizations.resize(end - begin);
    lines.prepare(begin, end, this->padded / 4, [&](int64_t row, char* to) {
      this->quantizations[row - begin] = this->quantize(row, reinterpret_cast<Element*>(to));
    });
  }

  OpenTiles open(int64_t panel, int64_t) const {
    thread_local std::vector<char> kept;
    return open_tiles(this->weight, blocks, panel, kept);
  }

  void product(const OpenTiles& opened, int64_t row, int64_t rows, int64_t panel, float* values) const {
    blocks_product<WeightFirst>(lines, row, rows, opened, values);
    this->dequantize(row, rows, panel, values);
  }
};

}  // namespace lissom
