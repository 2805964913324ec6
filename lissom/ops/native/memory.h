// A caching allocator for the large outputs of one call: the second layer reuses the memory that the first has freed.
//
// The system maps allocations beyond some 32 MB page by page and unmaps them when they are freed, which costs a quarter of the
// call when every layer does it. Between begin_call and end_call a thread keeps the blocks it frees; afterwards at most kMostKept.
#pragma once

#include "tensor.h"

#include <iterator>
#include <map>

namespace lissom {

constexpr size_t kLarge = 1 << 20;  // bytes of the smallest allocation that is cached
constexpr size_t kMostKept = 1 << 26;   // bytes a thread may keep between calls, about as much as the system's allocator keeps

struct FreeBlocks {
  int64_t depth = 0;
  std::multimap<size_t, void*> free;  // by bytes

  // Frees the largest blocks until at most `most` bytes are kept.
  void shrink(size_t most) {
    size_t held = 0;
    for (auto& [bytes, block] : free) held += bytes;
    for (; held > most; free.erase(std::prev(free.end()))) {
      held -= free.rbegin()->first;
      std::free(free.rbegin()->second);
    }
  }

  ~FreeBlocks() { shrink(0); }
};

inline FreeBlocks& free_blocks() {
  thread_local FreeBlocks found;
  return found;
}

inline void begin_call() { ++free_blocks().depth; }

inline void end_call() {
  FreeBlocks& mine = free_blocks();
  TORCH_CHECK(mine.depth > 0, "end_call without a begin_call on this thread");
  if (--mine.depth == 0) mine.shrink(kMostKept);
}

// The chains that this thread is in (chain.h).
inline int64_t& running() {
  thread_local int64_t found = 0;
  return found;
}

// An uninitialised tensor. The memory of a large one is cached by the thread that frees it within a call; a small one within a
// chain is no tensor of PyTorch until the chain returns it.
inline Tensor allocate(at::IntArrayRef sizes, at::TensorOptions options) {
  size_t bytes = contiguous_bytes(sizes, at::bytes_of(options.type));
  FreeBlocks& mine = free_blocks();
  bool cached = mine.depth > 0 && bytes >= kLarge;
  if (!cached && running() == 0) return at::empty(sizes, options);
  if (!cached) return {aligned_memory(bytes), bytes, [](void* freed, size_t) { std::free(freed); }, sizes, options.type};
  void* block;
  if (auto found = mine.free.find(bytes); found != mine.free.end()) {
    block = found->second;
    mine.free.erase(found);
  } else {
    block = aligned_memory(bytes);
  }
  auto release = [](void* freed, size_t size) {
    FreeBlocks& theirs = free_blocks();
    if (theirs.depth > 0) theirs.free.emplace(size, freed);
    else std::free(freed);
  };
  return {block, bytes, release, sizes, options.type};
}

}  // namespace lissom
