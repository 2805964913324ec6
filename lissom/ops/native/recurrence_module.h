// The entry points of the recurrences: they check and convert the operands. Sums are in float32, or float64 where the values are.
#pragma once

#include "checks.h"
#include "recurrences.h"

#include <tuple>

namespace lissom {
namespace {

inline void check_floating(const Tensor& tensor, const char* name) {
  check_readable(tensor, name);
  TORCH_CHECK(tensor.is_floating_point(), name, " is of ", tensor.scalar_type(), ", and must be of a floating dtype");
  for (int64_t size : tensor.sizes()) check_size(size, name);
}

// An operand of these sizes, contiguous, in the dtype of the sums.
inline Tensor operand(const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype, const char* name) {
  check_floating(tensor, name);
  TORCH_CHECK(tensor.sizes() == sizes, name, " has the sizes ", tensor.sizes(), ", and must have ", sizes);
  return tensor.to(dtype).contiguous();
}

// The state before the first token, which the kernel overwrites.
inline Tensor started(Optional state, at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& like) {
  if (!state) return at::zeros(sizes, like.options().dtype(dtype));
  return operand(*state, sizes, dtype, "a state").clone();
}

template <typename Work>
inline auto with_sums(const Tensor& values, Work&& work) {
  return values.scalar_type() == at::kDouble ? work(double{}) : work(float{});
}

std::tuple<Tensor, Tensor> gated_delta_rule(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& decay,
                                            const Tensor& beta, Optional state, double scale, bool normalizes) {
  check_floating(query, "queries"), check_floating(key, "keys"), check_floating(value, "values"), check_floating(decay, "decays");
  TORCH_CHECK(key.dim() == 4 && value.dim() == 4, "keys and values have ", key.dim(), " and ", value.dim(),
              " dimensions, and must be [batch, tokens, heads, features]");
  int64_t batch = value.size(0), tokens = value.size(1), heads = value.size(2), width = value.size(3);
  int64_t key_heads = key.size(2), n = key.size(3);
  TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, "there are ", heads, " value heads, and must be a multiple of the ",
              key_heads, " key heads");
  bool per_feature = decay.dim() == 4;
  return with_sums(value, [&](auto zero) {
    using S = decltype(zero);
    constexpr auto dtype = c10::CppTypeToScalarType<S>::value;
    Tensor q = operand(query, {batch, tokens, key_heads, n}, dtype, "queries");
    Tensor k = operand(key, {batch, tokens, key_heads, n}, dtype, "keys");
    Tensor v = operand(value, {batch, tokens, heads, width}, dtype, "values");
    Tensor rate = operand(beta, {batch, tokens, heads}, dtype, "beta");
    Tensor g = per_feature ? operand(decay, {batch, tokens, heads, n}, dtype, "decays")
                           : operand(decay, {batch, tokens, heads}, dtype, "decays");
    g = g.exp();
    Tensor kept = started(state, {batch, heads, n, width}, dtype, value), y = at::empty(v.sizes(), v.options());
    if (v.numel() > 0) {
      Tensor queries = at::empty(q.sizes(), q.options()), keys = at::empty(k.sizes(), k.options());
      int64_t rows = batch * tokens * key_heads;
      prepare_rows(q.const_data_ptr<S>(), queries.mutable_data_ptr<S>(), rows, n, normalizes, static_cast<S>(scale));
      prepare_rows(k.const_data_ptr<S>(), keys.mutable_data_ptr<S>(), rows, n, normalizes, S(1));
      run(DeltaRule<S>{queries.const_data_ptr<S>(), keys.const_data_ptr<S>(), v.const_data_ptr<S>(), rate.const_data_ptr<S>(),
                       g.const_data_ptr<S>(), kept.mutable_data_ptr<S>(), y.mutable_data_ptr<S>(), batch, tokens, key_heads, heads,
                       n, width, per_feature});
    }
    return std::make_tuple(y.to(value.scalar_type()), kept);
  });
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& step, const Tensor& a, const Tensor& b, const Tensor& c,
                                          Optional d, Optional state) {
  check_floating(x, "x"), check_floating(a, "a"), check_floating(b, "b");
  TORCH_CHECK(x.dim() == 4 && b.dim() == 4, "x and b have ", x.dim(), " and ", b.dim(), " dimensions, and must have four");
  int64_t batch = x.size(0), tokens = x.size(1), heads = x.size(2), channels = x.size(3), groups = b.size(2), n = b.size(3);
  TORCH_CHECK(groups > 0 && heads % groups == 0, "there are ", heads, " heads, and must be a multiple of the ", groups, " groups");
  bool per_state = a.dim() == 2;
  TORCH_CHECK(!per_state || (channels == 1 && groups == 1), "a has one number per state for ", channels, " channels and ", groups,
              " groups, and must have one per head there");
  return with_sums(x, [&](auto zero) {
    using S = decltype(zero);
    constexpr auto dtype = c10::CppTypeToScalarType<S>::value;
    Tensor values = operand(x, x.sizes(), dtype, "x"), steps = operand(step, {batch, tokens, heads}, dtype, "step");
    Tensor rates = per_state ? operand(a, {heads, n}, dtype, "a") : operand(a, {heads}, dtype, "a");
    Tensor writes = operand(b, {batch, tokens, groups, n}, dtype, "b"), reads = operand(c, {batch, tokens, groups, n}, dtype, "c");
    Tensor direct = d ? operand(*d, {heads}, dtype, "d") : Tensor();
    Tensor kept = started(state, {batch, heads, channels, n}, dtype, x), y = at::empty(x.sizes(), values.options());
    if (y.numel() > 0)
      run(Scan<S>{values.const_data_ptr<S>(), steps.const_data_ptr<S>(), rates.const_data_ptr<S>(), writes.const_data_ptr<S>(),
                  reads.const_data_ptr<S>(), direct.defined() ? direct.const_data_ptr<S>() : nullptr, kept.mutable_data_ptr<S>(),
                  y.mutable_data_ptr<S>(), batch, tokens, heads, channels, groups, n, per_state});
    return std::make_tuple(y.to(x.scalar_type()), kept);
  });
}

}  // namespace
}  // namespace lissom
