// A barrier between the ranks of one machine: each writes its step to shared memory, and waits until the others have reached it.
#pragma once

#include "checks.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>

namespace lissom {
namespace {

constexpr int64_t kLine = 8;        // int64 in a cache line; each rank has one line
constexpr int64_t kSpins = 500;     // polls before the first yield, some 20 µs
constexpr int64_t kYields = 200;    // yields before the rank sleeps between polls
constexpr auto kSleep = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// True once every rank has reached this step or a later one; false after `seconds`.
// steps: [ranks, 8]. Writes of a rank before the barrier are visible to all ranks after it.
bool barrier(const Tensor& steps, int64_t rank, int64_t step, double seconds) {
  check_readable(steps, "steps");
  TORCH_CHECK(steps.scalar_type() == at::kLong && steps.dim() == 2 && steps.is_contiguous() && steps.size(1) == kLine,
              "steps are int64, a line of ", kLine, " for each rank");
  int64_t ranks = steps.size(0);
  TORCH_CHECK(rank >= 0 && rank < ranks, "rank ", rank, " is out of range for ", ranks, " ranks");
  TORCH_CHECK(!std::isnan(seconds), "the seconds to wait are not a number");
  int64_t* steps_of_ranks = steps.mutable_data_ptr<int64_t>();
  std::atomic_ref<int64_t>(steps_of_ranks[rank * kLine]).store(step, std::memory_order_release);
  auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (int64_t other = 0, looks = 0; other < ranks;) {
    if (std::atomic_ref<int64_t>(steps_of_ranks[other * kLine]).load(std::memory_order_acquire) >= step) {
      ++other;
    } else if (++looks < kSpins) {
      pause();
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
