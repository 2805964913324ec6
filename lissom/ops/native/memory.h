// Large results of one call take each other's place: what the first layer has freed, the second writes to.
//
// The system hands out memory beyond some 32 MB page by page, and takes it back when it is freed; asked for by every layer
// anew, that costs a quarter of the call. Between begin_call and end_call a thread keeps what it frees; then at most kKept.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdint>
#include <iterator>
#include <map>

namespace lissom {

constexpr size_t kLarge = 1 << 20;  // bytes from which on it is worth while
constexpr size_t kKept = 1 << 26;   // bytes a thread may keep from call to call, about what the system's own allocator does

struct Kept {
  int64_t depth = 0;
  std::multimap<size_t, void*> free;  // by bytes

  // Gives back the largest, until no more than so many bytes are left.
  void shrink(size_t most) {
    size_t held = 0;
    for (auto& [bytes, block] : free) held += bytes;
    for (; held > most; free.erase(std::prev(free.end()))) {
      held -= free.rbegin()->first;
      c10::free_cpu(free.rbegin()->second);
    }
  }

  ~Kept() { shrink(0); }
};

inline Kept& kept() {
  thread_local Kept found;
  return found;
}

inline void begin_call() { ++kept().depth; }

inline void end_call() {
  Kept& mine = kept();
  TORCH_CHECK(mine.depth > 0, "end_call without a begin_call on this thread");
  if (--mine.depth == 0) mine.shrink(kKept);
}

// An uninitialised tensor. A large one made inside a call is kept by the thread that frees it there, for the next of its size.
inline at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  size_t bytes = at::detail::computeStorageNbytesContiguous(sizes, options.dtype().itemsize());  // raises when it overflows
  Kept& mine = kept();
  if (mine.depth == 0 || bytes < kLarge) return at::empty(sizes, options);
  void* block;
  if (auto found = mine.free.find(bytes); found != mine.free.end()) {
    block = found->second;
    mine.free.erase(found);
  } else {
    block = c10::alloc_cpu(bytes);
  }
  auto release = [bytes](void* freed) {
    Kept& theirs = kept();
    if (theirs.depth > 0) theirs.free.emplace(bytes, freed);
    else c10::free_cpu(freed);
  };
  return at::from_blob(block, sizes, release, options);
}

}  // namespace lissom
