// Helpers of the operator implementations that PyTorch dispatches to.
#pragma once

#include "attention.h"
#include "checks.h"

namespace lissom {
namespace {

// Dispatches on the dtype of x, float32 or bfloat16.
template <typename OfFloat, typename OfBFloat16>
Tensor by_dtype(const Tensor& x, OfFloat&& of_float, OfBFloat16&& of_bfloat16) {
  if (x.scalar_type() == at::kFloat) return of_float();
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && kHasBFloat16, "this processor's kernels compute in float32",
              kHasBFloat16 ? " and bfloat16" : "", ", not in ", x.scalar_type());
  return of_bfloat16();
}

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

}  // namespace
}  // namespace lissom
