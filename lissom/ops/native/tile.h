// The inner loop of every matrix product here: a tile of sums in registers, rows of one matrix times a panel of packed columns.
//
// A panel holds kPanel columns of one matrix: for floats [steps, kPanel], for bfloat16 [steps, kPanel, 2], where one step
// takes two values along the reduction axis, as the machine's instruction does; for int8 [steps, kPanel, 4], likewise.
#pragma once

#include "vector.h"

#include <utility>

namespace lissom {

constexpr int kPanel = 32;
constexpr int kWide = 2;                                // vectors of a tile's row
constexpr int kChunk = kWide * kLanes;                  // columns of a tile
static_assert(kPanel % kChunk == 0);

template <typename T>
constexpr int kPair = 4 / sizeof(T);  // values a step takes along the reduction axis

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

// Quantized activations are held as Element: uint8 where an instruction adds four int8 products (VNNI); else int16, since AVX2's
// int8 instruction saturates sums at 16 bits, and its int16 instruction adds two products exactly.  Four weights are then two pairs
// of int16, weights 0 and 2 and weights 1 and 3, and activations are kept in the order 0, 2, 1, 3.
#if defined(__AVX512VNNI__)
constexpr bool kHasInt8 = true;
using Element = uint8_t;
inline IntVec product(const uint8_t* a, const int8_t* b, IntVec sum) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), _mm512_loadu_si512(b));
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr bool kHasInt8 = true;
using Element = uint8_t;
inline IntVec product(const uint8_t* a, const int8_t* b, IntVec sum) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  __m256i columns = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(four), columns);
}
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool kHasInt8 = true;
using Element = int16_t;
typedef int16_t WordVec __attribute__((vector_size(kLanes * 4)));
inline IntVec sum_of_two(const int16_t* a, WordVec b) {
  int32_t two;
  std::memcpy(&two, a, sizeof two);
#if defined(__AVX512BW__)
  return (IntVec)_mm512_madd_epi16(_mm512_set1_epi32(two), (__m512i)b);
#else
  return (IntVec)_mm256_madd_epi16(_mm256_set1_epi32(two), (__m256i)b);
#endif
}
inline IntVec product(const int16_t* a, const int8_t* b, IntVec sum) {
  WordVec pairs;
  std::memcpy(&pairs, b, sizeof pairs);
  return sum + sum_of_two(a, pairs << 8 >> 8) + sum_of_two(a + 2, pairs >> 8);
}
#else
constexpr bool kHasInt8 = false;
using Element = uint8_t;
inline IntVec product(const uint8_t*, const int8_t*, IntVec sum) { return sum; }  // never called
#endif

// sums[r][v] += a[r, :] times columns v of the chunk at b.  a: rows `stride` apart.  With `fetches` the next panel of the
// weights is prefetched meanwhile.
template <int R, bool fetches = false, typename A, typename B, typename Sum>
inline __attribute__((always_inline)) void multiply(
    const A* a, int64_t stride, const B* b, int64_t steps, Sum (&sums)[R][kWide]) {
  constexpr int pair = kPair<B>;
  const A* rows[(R + 2) / 3];
  const char* coming = reinterpret_cast<const char*>(b + steps * kPanel * pair);
#pragma GCC unroll 8
  for (int r = 0; r < R; r += 3) rows[r / 3] = a + r * stride;
  for (int64_t step = 0; step < steps; ++step) {
    if (fetches) {
#pragma GCC unroll 2
      for (int line = 0; line < kChunk * 4; line += 64) __builtin_prefetch(coming + line, 0, 2);
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

// Calls work(std::integral_constant<int, rows>): dispatches a number of rows known at run time to a template.
template <typename Work, int... R>
inline void with_rows(int rows, Work&& work, std::integer_sequence<int, R...>) {
  (void)((rows == R + 1 && (work(std::integral_constant<int, R + 1>{}), true)) || ...);
}

template <typename Work>
inline void with_rows(int rows, Work&& work) {
  with_rows(rows, std::forward<Work>(work), std::make_integer_sequence<int, kRows>{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }  // 0 <= a; does not overflow

// Splits [begin, end) into the fewest pieces of at most `most`, of nearly equal size.
template <typename Work>
inline void in_pieces(int64_t begin, int64_t end, int64_t most, Work&& work) {
  int64_t count = end - begin, pieces = ceil_div(count, most);
  for (int64_t piece = 0; piece < pieces; ++piece)
    work(begin + count * piece / pieces, begin + count * (piece + 1) / pieces);
}

}  // namespace lissom
