// Ranks of one machine meet: each tells in memory they share how far it is, and waits until the others are as far.
#pragma once

#include "checks.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>

namespace lissom {
namespace {

constexpr int64_t kLine = 8;        // numbers in a line of the cache, of which each rank has one
constexpr int64_t kSpins = 500;     // looks before the processor is given to others, some 20 µs
constexpr int64_t kYields = 200;    // times it is given to whoever is ready, before this rank sleeps between looks
constexpr auto kSleep = std::chrono::microseconds(50);

inline void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// True once every rank has told of this step or a later one; false after so many seconds.
// steps: [ranks, 8]. What a rank wrote before it told of a step is seen by all that have met there.
bool meet(const at::Tensor& steps, int64_t rank, int64_t step, double seconds) {
  check_readable(steps, "steps");
  TORCH_CHECK(steps.scalar_type() == at::kLong && steps.dim() == 2 && steps.is_contiguous() && steps.size(1) == kLine,
              "steps are int64, a line of ", kLine, " for each rank");
  int64_t ranks = steps.size(0);
  TORCH_CHECK(rank >= 0 && rank < ranks, "rank ", rank, " is none of ", ranks);
  TORCH_CHECK(!std::isnan(seconds), "the seconds to wait are not a number");
  int64_t* told = steps.mutable_data_ptr<int64_t>();
  std::atomic_ref<int64_t>(told[rank * kLine]).store(step, std::memory_order_release);
  auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (int64_t other = 0, looks = 0; other < ranks;) {
    if (std::atomic_ref<int64_t>(told[other * kLine]).load(std::memory_order_acquire) >= step) {
      ++other;
    } else if (++looks < kSpins) {
      rest();
    } else if (looks < kSpins + kYields) {
      std::this_thread::yield();
    } else {
      if (std::chrono::steady_clock::now() > until) return false;
      std::this_thread::sleep_for(kSleep);
    }
  }
  return true;
}

}  // namespace
}  // namespace lissom
