// Matrix products by Intel's AMX: tiles of 16 rows by 64 bytes, multiplied with the packed panels of tile.h as they are.
//
// Without the instructions the same operations are emulated in plain C++; this is slow, and only tests switch it on.
#pragma once

#include "tile.h"

#include <vector>

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lissom {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;                // of a row
constexpr int kAmxRows = 2 * kTileRows;       // rows of a product: two tiles of x times the two tiles of a panel
constexpr int64_t kFewestAmxRows = 8;         // fewer rows are multiplied by vectors: a tile takes as long for one row as for 16
constexpr int64_t kPanelBytes = kPanel * 4;   // of one step of a panel, in every dtype
constexpr int64_t kStepsOfTile = kTileBytes / 4;

struct WeightFirst {};  // in place of the dtype of the left operand: signed bytes, times unsigned bytes on the right

#if defined(__AMX_TILE__)

constexpr bool kHasAmx = true;

// Asks the operating system once for the use of tiles.
inline bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Tiles may be used while this exists. Those of sums, 0 to 3, have up to 16 rows of 64 bytes; 4 and 5 hold `depth` bytes of each row
// of x, and 6 and 7 as much of each column of the weight.
template <int depth>
struct TileScope {
  explicit TileScope(int64_t most = kTileRows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, depth, depth, 64, 64};
      uint8_t rows[16] = {0, 0, 0, 0, 0, 0, depth / 4, depth / 4};
    } config;
    std::fill(config.rows, config.rows + 6, static_cast<uint8_t>(std::min<int64_t>(most, kTileRows)));
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

// Macros, since the numbers of tiles become part of the instructions.
#define LISSOM_TILE_ZERO(tile) _tile_zero(tile)
#define LISSOM_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define LISSOM_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define LISSOM_TILE_DOT(T, sum, a, b)                                   \
  do {                                                                  \
    if constexpr (std::is_same_v<T, BFloat16>) _tile_dpbf16ps(sum, a, b); \
    else if constexpr (std::is_same_v<T, int8_t>) _tile_dpbssd(sum, a, b); \
    else if constexpr (std::is_same_v<T, WeightFirst>) _tile_dpbsud(sum, a, b); \
    else _tile_dpbusd(sum, a, b);                                       \
  } while (false)

#else

constexpr bool kHasAmx = false;
inline bool amx_permitted() { return false; }

struct EmulatedTile {
  alignas(64) unsigned char bytes[kTileRows][kTileBytes];
};
inline thread_local EmulatedTile emulated[8];
inline thread_local int emulated_depth;

template <int depth>
struct TileScope {
  explicit TileScope(int64_t = 0) { emulated_depth = depth; }
};

template <typename T>
inline void emulated_dot(EmulatedTile& sum, const EmulatedTile& a, const EmulatedTile& b) {
  constexpr bool swapped = std::is_same_v<T, WeightFirst>;
  using Left = std::conditional_t<swapped, int8_t, T>;
  using Right = std::conditional_t<swapped, uint8_t, std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, int8_t>>;
  using Sum = std::conditional_t<std::is_same_v<T, BFloat16>, float, int32_t>;
  constexpr int pair = 4 / sizeof(Left);
  for (int row = 0; row < kTileRows; ++row)
    for (int column = 0; column < kTileBytes / 4; ++column) {
      Sum total;
      std::memcpy(&total, &sum.bytes[row][4 * column], 4);
      for (int step = 0; step < kTileBytes / 4; ++step) {
        Left left[pair];
        Right right[pair];
        std::memcpy(left, &a.bytes[row][4 * step], 4), std::memcpy(right, &b.bytes[step][4 * column], 4);
        for (int i = 0; i < pair; ++i) total += static_cast<Sum>(left[i]) * static_cast<Sum>(right[i]);
      }
      std::memcpy(&sum.bytes[row][4 * column], &total, 4);
    }
}

// Of x or of the weight.
inline void emulated_load(int tile, const void* from, int64_t stride) {
  const bool of_x = tile < 6;
  emulated[tile] = EmulatedTile{};
  for (int row = 0; row < (of_x ? kTileRows : emulated_depth / 4); ++row)
    std::memcpy(emulated[tile].bytes[row], static_cast<const char*>(from) + row * stride, of_x ? emulated_depth : kTileBytes);
}

inline void emulated_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < kTileRows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, emulated[tile].bytes[row], kTileBytes);
}

#define LISSOM_TILE_ZERO(tile) emulated[tile] = EmulatedTile{}
#define LISSOM_TILE_LOAD(tile, from, stride) emulated_load(tile, from, stride)
#define LISSOM_TILE_STORE(tile, to, stride) emulated_store(tile, to, stride)
#define LISSOM_TILE_DOT(T, sum, a, b) emulated_dot<T>(emulated[sum], emulated[a], emulated[b])

#endif

using AmxScope = TileScope<kTileBytes>;

// Whether products of many rows go by tiles.
inline std::atomic<bool> amx{amx_permitted()};

// A panel of packed columns: [steps, kPanel, values of a step], and a copy of its last steps, filled up with zeros to a whole tile.
struct AmxPanel {
  const char* steps;
  int64_t tiles;        // whole ones, of kStepsOfTile steps
  const char* rest;     // null where there is none
};

// Cuts a panel of so many steps into tiles. rest: room for a tile of two times 16 columns.
inline AmxPanel amx_panel(const void* panel, int64_t steps, std::vector<char>& rest) {
  const char* from = static_cast<const char*>(panel);
  int64_t tiles = steps / kStepsOfTile, left = steps % kStepsOfTile;
  if (left == 0) return {from, tiles, nullptr};
  rest.assign(kStepsOfTile * kPanelBytes, 0);
  std::copy(from + tiles * kStepsOfTile * kPanelBytes, from + steps * kPanelBytes, rest.data());
  return {from, tiles, rest.data()};
}

// out = a times the panel, [16 or 32, kPanel] of 32-bit sums. Rows of a are `stride` bytes apart, and hold whole tiles; two: 32 rows.
template <typename T, bool two>
inline void amx_product(const void* a, int64_t stride, const AmxPanel& panel, void* out, int64_t out_stride) {
  const char *upper = static_cast<const char*>(a), *lower = upper + kTileRows * stride, *b = panel.steps;
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  LISSOM_TILE_ZERO(0);
  LISSOM_TILE_ZERO(1);
  if constexpr (two) {
    LISSOM_TILE_ZERO(2);
    LISSOM_TILE_ZERO(3);
  }
  int64_t count = panel.tiles + (panel.rest != nullptr);
  for (int64_t tile = 0; tile < count; ++tile) {
    if (tile == panel.tiles) b = panel.rest;
    LISSOM_TILE_LOAD(4, upper, stride);
    LISSOM_TILE_LOAD(6, b, kPanelBytes);
    LISSOM_TILE_LOAD(7, b + kTileBytes, kPanelBytes);
    LISSOM_TILE_DOT(T, 0, 4, 6);
    LISSOM_TILE_DOT(T, 1, 4, 7);
    if constexpr (two) {
      LISSOM_TILE_LOAD(5, lower, stride);
      LISSOM_TILE_DOT(T, 2, 5, 6);
      LISSOM_TILE_DOT(T, 3, 5, 7);
    }
    upper += kTileBytes, lower += kTileBytes, b += kStepsOfTile * kPanelBytes;
  }
  char* to = static_cast<char*>(out);
  LISSOM_TILE_STORE(0, to, out_stride);
  LISSOM_TILE_STORE(1, to + kTileBytes, out_stride);
  if constexpr (two) {
    LISSOM_TILE_STORE(2, to + kTileRows * out_stride, out_stride);
    LISSOM_TILE_STORE(3, to + kTileRows * out_stride + kTileBytes, out_stride);
  }
}

constexpr int64_t kInTile = kTileBytes / sizeof(BFloat16);  // values of bfloat16 in a row of a tile

// `count` values along the reduction axis of a panel of bfloat16, a multiple of kInTile.
inline AmxPanel amx_panel(const BFloat16* from, int64_t count) {
  return {reinterpret_cast<const char*>(from), count / kInTile, nullptr};
}

// The same for up to 32 rows; reads and writes whole tiles of 16.
template <typename T>
inline void amx_product(int64_t rows, const void* a, int64_t stride, const AmxPanel& panel, void* out, int64_t out_stride) {
  if (rows > kTileRows) amx_product<T, true>(a, stride, panel, out, out_stride);
  else amx_product<T, false>(a, stride, panel, out, out_stride);
}

// x in bfloat16 times the panels of another source, by tiles.
template <typename Source>
struct Tiled {
  static constexpr bool kSharesRows = true;
  static constexpr int64_t kProductRows = kAmxRows, kFewRows = 0;
  using Scope = AmxScope;
  Source source;
  int64_t inputs;
  int64_t origin = 0;              // the first row of `copied`
  std::vector<BFloat16> copied{};  // x in rows of whole tiles, where it is not that itself

  int64_t row_bytes() const { return inputs * sizeof(BFloat16); }
  int64_t width() const { return ceil_div(inputs, kInTile) * kInTile; }

  void prepare(int64_t begin, int64_t end) {
    origin = begin;
    copied.clear();
    if (inputs == width() && (end - begin) % kTileRows == 0) return;
    copied.assign(ceil_div(end - begin, kTileRows) * kTileRows * width(), BFloat16(0));
    for (int64_t row = begin; row < end; ++row)
      std::copy(source.x + row * inputs, source.x + (row + 1) * inputs, copied.data() + (row - begin) * width());
  }

  AmxPanel open(int64_t panel, int64_t rows) const {
    thread_local std::vector<char> rest;
    return amx_panel(source.open(panel, rows), inputs / 2, rest);
  }

  // Rows [row, row + rows) times the panel, at most kAmxRows, into `sums`, [kAmxRows, kPanel].
  void product(const AmxPanel& opened, int64_t row, int64_t rows, int64_t, float* sums) const {
    const BFloat16* a = copied.empty() ? source.x + row * inputs : copied.data() + (row - origin) * width();
    amx_product<BFloat16>(rows, a, width() * sizeof(BFloat16), opened, sums, kPanelBytes);
  }
};

}  // namespace lissom
