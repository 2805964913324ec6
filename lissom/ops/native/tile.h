// The heart of every product here: a tile of sums in registers, rows of a matrix times a panel of packed columns.
//
// A panel holds kPanel columns of one matrix: for floats [steps, kPanel], for bfloat16 [steps, kPanel, 2], where one step
// takes two values along the summed axis, as the machine's instruction does; for bytes [steps, kPanel, 4], likewise.
#pragma once

#include "vector.h"

#include <utility>

namespace lissom {

constexpr int kPanel = 32;
constexpr int kWide = 2;                                // vectors of a tile's row
constexpr int kChunk = kWide * kLanes;                  // columns of a tile
static_assert(kPanel % kChunk == 0);

template <typename T>
constexpr int kPair = 4 / sizeof(T);  // values a step takes along the summed axis

inline Vec product(const float* a, const float* b, Vec sum) { return sum + splat(*a) * load(b); }

#if defined(__AVX512BF16__)
inline Vec product(const BFloat16* a, const BFloat16* b, Vec sum) {
  int32_t pair;
  std::memcpy(&pair, a, sizeof pair);
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
}
#else
inline Vec product(const BFloat16*, const BFloat16*, Vec sum) { return sum; }  // never called: kHasBFloat16 is false
#endif

#if defined(__AVX512VNNI__)
constexpr bool kHasBytes = true;
inline IntVec product(const uint8_t* a, const int8_t* b, IntVec sum) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), _mm512_loadu_si512(b));
}
#else
constexpr bool kHasBytes = false;
inline IntVec product(const uint8_t*, const int8_t*, IntVec sum) { return sum; }  // never called
#endif

// sums[r][v] += a[r, :] times columns v of the chunk at b.  a: rows `stride` apart.  If it fetches, what lies one panel further
// is brought into the cache meanwhile: the next panel of the weights, which may come from far.
template <int R, bool fetches = false, typename A, typename B, typename Sum>
inline __attribute__((always_inline)) void multiply(
    const A* a, int64_t stride, const B* b, int64_t steps, Sum (&sums)[R][kWide]) {
  constexpr int pair = kPair<A>;
  static_assert(sizeof(A) == sizeof(B));
  const A* rows[(R + 2) / 3];
  const char* coming = reinterpret_cast<const char*>(b + steps * kPanel * pair);
#pragma GCC unroll 8
  for (int r = 0; r < R; r += 3) rows[r / 3] = a + r * stride;
  for (int64_t step = 0; step < steps; ++step) {
    if (fetches) {
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) __builtin_prefetch(coming + v * 64, 0, 2);
      coming += kPanel * pair * sizeof(B);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v)
        sums[r][v] = product(rows[r / 3] + (r % 3) * stride, b + v * kLanes * pair, sums[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 3) rows[r / 3] += pair;
    b += kPanel * pair;
  }
}

// Calls work(std::integral_constant<int, rows>) for a number of rows known only while running.
template <typename Work, int... R>
inline void with_rows(int rows, Work&& work, std::integer_sequence<int, R...>) {
  (void)((rows == R + 1 && (work(std::integral_constant<int, R + 1>{}), true)) || ...);
}

template <typename Work>
inline void with_rows(int rows, Work&& work) {
  with_rows(rows, std::forward<Work>(work), std::make_integer_sequence<int, kRows>{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts [begin, end) into the fewest pieces of at most `most`, all but equal.
template <typename Work>
inline void in_pieces(int64_t begin, int64_t end, int64_t most, Work&& work) {
  int64_t count = end - begin, pieces = ceil_div(count, most);
  for (int64_t piece = 0; piece < pieces; ++piece)
    work(begin + count * piece / pieces, begin + count * (piece + 1) / pieces);
}

}  // namespace lissom
