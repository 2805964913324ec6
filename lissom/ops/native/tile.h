// The inner loop of every matrix product here: a tile of sums in registers, rows of one matrix times a panel of packed columns.
//
// A panel holds kPanel columns of one matrix: for floats [steps, kPanel], for bfloat16 [steps, kPanel, 2], where one step
// takes two values along the reduction axis, as the machine's instruction does; for int8 [steps, kPanel, 4], likewise.
#pragma once

#include "vector.h"

#include <atomic>
#include <chrono>
#include <type_traits>
#include <utility>

namespace lissom {

constexpr int kPanel = 32;
constexpr int kWide = 2;                                // vectors of a tile's row
constexpr int kChunk = kWide * kLanes;                  // columns of a tile
static_assert(kPanel % kChunk == 0);

// Where group-wise scales, [panels, groups, kPanel], have that of a group and a packed column.
inline int64_t place_of(int64_t group, int64_t groups, int64_t column) {
  return (column / kPanel * groups + group) * kPanel + column % kPanel;
}

template <typename T>
constexpr int kPair = 4 / sizeof(T);  // values a step takes along the reduction axis

inline Vec product(const float* a, const float* b, Vec sum) { return sum + splat(*a) * load(b); }

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;  // an instruction that adds two products of bfloat16
inline Vec product(const BFloat16* a, const BFloat16* b, Vec sum) {
  int32_t pair;
  std::memcpy(&pair, a, sizeof pair);
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
}

// Whether that instruction beats two multiplications in float32: processors differ by a factor of four. Takes some 50 microseconds.
inline bool dot_is_fast() {
  alignas(64) BFloat16 pairs[2 * kLanes] = {};
  alignas(64) float floats[kLanes] = {};
  auto fastest = [](auto step) {
    constexpr int kSums = 12, kSteps = 500, kRuns = 8;
    auto best = std::chrono::nanoseconds::max();
    for (int run = 0; run < kRuns; ++run) {
      Vec sums[kSums] = {};
      auto started = std::chrono::steady_clock::now();
      for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
        for (int n = 0; n < kSums; ++n) {
          sums[n] = step(sums[n]);
          asm volatile("" : "+v"(sums[n]));
        }
      }
      best = std::min<std::chrono::nanoseconds>(best, std::chrono::steady_clock::now() - started);
    }
    return best;
  };
  auto dot = fastest([&](Vec sum) { return product(pairs, pairs, sum); });
  return dot < 2 * fastest([&](Vec sum) { return product(floats, floats, sum); });
}
#else
constexpr bool kHasDot = false;
inline Vec product(const BFloat16*, const BFloat16*, Vec sum) { return sum; }  // never called
inline bool dot_is_fast() { return false; }
#endif

// Whether bfloat16 is multiplied by that instruction, or in float32.
inline std::atomic<bool> dots{dot_is_fast()};

// Calls work(P{}), P the dtype in which values of dtype T are multiplied.
template <typename T, typename Work>
inline auto with_operand(Work&& work) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if constexpr (kHasDot)
      if (dots.load(std::memory_order_relaxed)) return work(BFloat16{});
    return work(float{});
  } else {
    return work(T{});
  }
}

// Quantized activations are held as Element: uint8 where an instruction adds four int8 products (VNNI); else int16, since AVX2's
// int8 instruction saturates sums at 16 bits, and its int16 instruction adds two products exactly.  Four weights are then two pairs
// of int16, weights 0 and 2 and weights 1 and 3, and activations are kept in the order 0, 2, 1, 3.
typedef int8_t ByteVec __attribute__((vector_size(kLanes * 4)));  // four weights of each of kLanes columns
#if defined(__AVX512VNNI__)
constexpr bool kHasInt8 = true;
using Element = uint8_t;
inline IntVec product(const uint8_t* a, ByteVec b, IntVec sum) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)b);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr bool kHasInt8 = true;
using Element = uint8_t;
inline IntVec product(const uint8_t* a, ByteVec b, IntVec sum) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(four), (__m256i)b);
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
inline IntVec product(const int16_t* a, ByteVec b, IntVec sum) {
  WordVec pairs = (WordVec)b;
  return sum + sum_of_two(a, pairs << 8 >> 8) + sum_of_two(a + 2, pairs >> 8);
}
#else
constexpr bool kHasInt8 = false;
using Element = uint8_t;
inline IntVec product(const uint8_t*, ByteVec, IntVec sum) { return sum; }  // never called
#endif
inline ByteVec load_bytes(const void* from) {
  ByteVec found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
inline IntVec product(const Element* a, const int8_t* b, IntVec sum) { return product(a, load_bytes(b), sum); }

// The same for signed activations; weights are then unsigned where kRaises, since VNNI multiplies unsigned by signed bytes.
constexpr bool kRaises = std::is_same_v<Element, uint8_t>;
inline IntVec signed_product(const Element* a, ByteVec b, IntVec sum) {
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
  int32_t four;
  std::memcpy(&four, a, sizeof four);
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32(four));
#else
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)b, _mm256_set1_epi32(four));
#endif
#else
  return product(a, b, sum);
#endif
}

constexpr int64_t kAhead = 4096;  // bytes: beyond a page's end, where the hardware's prefetcher may stop

// sums[r][v] += a[r, :] times columns v of the chunk at b.  a: rows `stride` apart.  With `fetches` weights are prefetched meanwhile:
// those kAhead bytes on where they are read once, else the next panel.
template <int R, bool fetches = false, typename A, typename B, typename Sum>
inline __attribute__((always_inline)) void multiply(
    const A* a, int64_t stride, const B* b, int64_t steps, Sum (&sums)[R][kWide], bool once = false) {
  constexpr int pair = kPair<B>;
  const A* rows[(R + 2) / 3];
  const char* coming = reinterpret_cast<const char*>(b) + (once ? kAhead : steps * kPanel * pair * int64_t(sizeof(B)));
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

// The two values of each pair of a packed bfloat16 weight, [2, kLanes] of an [kLanes, 2].
inline Vec first_of_pairs(BitVec pairs) { return (Vec)(pairs << 16); }
inline Vec second_of_pairs(BitVec pairs) { return (Vec)(pairs & 0xffff0000u); }
inline BitVec load_pairs(const BFloat16* from) {
  BitVec found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

// The same for a float a and a packed bfloat16 b, which is widened in registers.
template <int R>
inline __attribute__((always_inline)) void multiply_widened(
    const float* a, int64_t stride, const BFloat16* b, int64_t steps, Vec (&sums)[R][kWide]) {
  const float* rows[(R + 2) / 3];
#pragma GCC unroll 8
  for (int r = 0; r < R; r += 3) rows[r / 3] = a + r * stride;
  for (int64_t step = 0; step < steps; ++step, b += kPanel * 2) {
    __builtin_prefetch(reinterpret_cast<const char*>(b) + kAhead, 0, 2);
#pragma GCC unroll 2
    for (int second = 0; second < 2; ++second) {
      Vec columns[kWide];
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        BitVec pairs = load_pairs(b + v * kLanes * 2);
        columns[v] = second ? second_of_pairs(pairs) : first_of_pairs(pairs);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) sums[r][v] += splat(rows[r / 3][(r % 3) * stride + second]) * columns[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 3) rows[r / 3] += 2;
  }
}

// Widens `steps` steps of a packed bfloat16 panel to rows of floats, [2 * steps, kPanel].
inline void widen_pairs(const BFloat16* from, int64_t steps, float* to) {
  for (int64_t step = 0; step < steps; ++step, from += kPanel * 2, to += kPanel * 2) {
    __builtin_prefetch(from + 8 * kPanel * 2, 0, 2);
#pragma GCC unroll 8
    for (int c = 0; c < kPanel; c += kLanes) {
      BitVec pairs = load_pairs(from + c * 2);
      store(to + c, first_of_pairs(pairs));
      store(to + kPanel + c, second_of_pairs(pairs));
    }
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

// The steps summed in registers before their sum is added to the total: a longer sum in float32 rounds more, and the columns
// of so many stay in the L1 cache beside the sums of some rows.
constexpr int64_t kDepth = 192;

// sums, [R, kPanel] of which a chunk starts there, = or += R rows of a, `stride` apart, times `steps` steps of the columns at b.
template <int R, bool fetches>
inline void accumulate(const float* a, int64_t stride, const float* b, int64_t steps, float* sums, bool first) {
  Vec held[R][kWide] = {};
  multiply<R, fetches>(a, stride, b, steps, held);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kWide; ++v) {
      float* place = sums + r * kPanel + v * kLanes;
      store(place, first ? held[r][v] : load(place) + held[r][v]);
    }
}

// sums, [rows, kPanel], = rows of a times a panel of `inputs` inputs.  columns(from, depth) are those of a part of the inputs.
// With `fetches` what follows a part in memory is prefetched while the first rows are multiplied.
template <bool fetches, typename Columns>
inline void multiply_parts(const float* a, int64_t inputs, int64_t rows, Columns&& columns, float* sums) {
  if (inputs == 0) std::fill(sums, sums + rows * kPanel, 0.0f);
  for (int64_t from = 0; from < inputs; from += kDepth) {
    int64_t depth = std::min(kDepth, inputs - from);
    const float* part = columns(from, depth);
    in_pieces(0, rows, kRows, [&](int64_t top, int64_t bottom) {
      with_rows(static_cast<int>(bottom - top), [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (int column = 0; column < kPanel; column += kChunk) {
          const float* rows = a + top * inputs + from;
          float* to = sums + top * kPanel + column;
          if (fetches && top == 0) accumulate<R, true>(rows, inputs, part + column, depth, to, from == 0);
          else accumulate<R, false>(rows, inputs, part + column, depth, to, from == 0);
        }
      });
    });
  }
}

// The same for R rows and one chunk, in registers; bfloat16 rounds far more than a long sum, so its sums are not split.
template <int R, bool fetches, typename T>
inline void multiply_in_parts(const T* a, int64_t inputs, const T* b, Vec (&sums)[R][kWide], bool once = false) {
  constexpr int pair = kPair<T>;
  if constexpr (!std::is_same_v<T, float>) return multiply<R, fetches>(a, inputs, b, inputs / pair, sums, once);
  for (int64_t from = 0; from < inputs; from += kDepth) {
    Vec part[R][kWide] = {};
    multiply<R, fetches>(a + from, inputs, b + from * kPanel, std::min(kDepth, inputs - from) / pair, part, once);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kWide; ++v) sums[r][v] += part[r][v];
  }
}

}  // namespace lissom
