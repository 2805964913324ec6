// Checks of operands, which every entry point runs before it reads their memory.
#pragma once

#include "vector.h"

namespace lissom {
namespace {

// The largest size of a dimension. The product of two sizes, and of a few constants, then fits in 64 bits.
constexpr int64_t kLargestSize = (int64_t(1) << 31) - 1;

inline void check_size(int64_t size, const char* name) {
  TORCH_CHECK(size >= 0 && size <= kLargestSize, name, " is ", size, ", and must be from 0 to ", kLargestSize);
}

// Every element must be readable: dense, on the CPU, aligned, and within its storage.
inline void check_readable(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.defined(), name, " is None, and must be a tensor");
  TORCH_CHECK(tensor.is_cpu() && tensor.is_strided(), name, " must be a dense tensor on the CPU");
  if (tensor.numel() == 0) return;
  size_t item = tensor.element_size(), last = tensor.storage_offset();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  size_t needed = (last + 1) * item;
  TORCH_CHECK(needed <= tensor.storage_bytes(), name, " reaches ", needed, " bytes into a storage of ",
              tensor.storage_bytes(), "; clone it before its storage is resized");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % item == 0, name, " is not aligned to its dtype; clone it");
}

inline void check_readable(Optional tensor, const char* name) {
  if (tensor) check_readable(*tensor, name);
}

// Indices as contiguous int64.
inline Tensor checked_indices(const Tensor& given) {
  check_readable(given, "indices");
  TORCH_CHECK(given.scalar_type() == at::kLong || given.scalar_type() == at::kInt, "indices are of ", given.scalar_type(),
              ", and must be int64 or int32");
  return given.to(at::kLong).contiguous();
}

// Calls work(T{}) for the dtype T of x, float32 or bfloat16.
template <typename Work>
Tensor by_dtype(const Tensor& x, Work&& work) {
  if (x.scalar_type() == at::kFloat) return work(float{});
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "the kernels compute in float32 and bfloat16, not in ", x.scalar_type());
  return work(BFloat16{});
}

inline void check_dtype(const Tensor& tensor, at::ScalarType dtype, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " is of ", tensor.scalar_type(), ", and must be of ", dtype);
}

// A contiguous operand of exactly these sizes and this dtype.
inline void check_exact(const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype, const char* name) {
  check_readable(tensor, name);
  check_dtype(tensor, dtype, name);
  TORCH_CHECK(tensor.sizes() == sizes && tensor.is_contiguous(), name, " has the sizes ", tensor.sizes(), " and strides ",
              tensor.strides(), ", and must be contiguous with the sizes ", sizes);
}

// An operand that is converted to the kernel's dtype: a bias or the weight of a norm.
inline void check_floats(Optional tensor, at::IntArrayRef sizes, const char* name) {
  if (!tensor) return;
  check_readable(*tensor, name);
  TORCH_CHECK(tensor->is_floating_point() && tensor->sizes() == sizes, name, " is of ", tensor->scalar_type(), " with the sizes ",
              tensor->sizes(), ", and must be of a floating dtype with the sizes ", sizes);
}

}  // namespace
}  // namespace lissom
