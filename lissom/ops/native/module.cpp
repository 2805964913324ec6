// Registers the CPU kernels of `lissom::` operators; each is checked against the reference in lissom/ops.
#include "attention.h"
#include "linear.h"
#include "memory.h"
#include "rows.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

namespace lissom {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

Activation activation_of(c10::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK(false, "lissom::packed_linear has no activation '", std::string(name), "'");
}

template <typename T>
struct Held {  // keeps a contiguous tensor of the call's dtype alive, and points into it
  Tensor tensor;
  Held(Optional given, const Tensor& like) {
    if (given) tensor = given->to(like.scalar_type()).contiguous();
  }
  const T* pointer() const { return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr; }
};

template <typename T>
Tensor linear_of(const Tensor& given, const Tensor& weight, Optional bias, Optional other, Optional norm_weight,
                 Optional norm_bias, bool norms, double eps, int64_t features, Activation activation, bool multiplies) {
  Tensor x = given.contiguous();
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == x.scalar_type(), "a packed weight is of the input's dtype");
  auto sizes = x.sizes().vec();
  int64_t inputs = sizes.back();
  TORCH_CHECK(weight.numel() == ceil_div(features, kPanel) * kPanel * inputs, "a packed weight holds inputs x features");
  sizes.back() = features;
  Tensor y = fresh(sizes, x.options());
  Held<T> b(bias, x), o(other, x), nw(norm_weight, x), nb(norm_bias, x);
  TORCH_CHECK(!other || o.tensor.numel() == y.numel(), "what is added to the product has its shape");
  if (y.numel() == 0) return y;
  run(Linear<T>{x.const_data_ptr<T>(), weight.const_data_ptr<T>(), b.pointer(), o.pointer(), y.mutable_data_ptr<T>(),
                x.numel() / std::max<int64_t>(inputs, 1), inputs, features, activation, multiplies, nw.pointer(), nb.pointer(),
                norms, static_cast<float>(eps)});
  return y;
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, Optional bias, Optional other, int64_t features,
                     c10::string_view activation, c10::string_view combine) {
  auto function = x.scalar_type() == at::kFloat ? linear_of<float> : linear_of<BFloat16>;
  return function(x, weight, bias, other, {}, {}, false, 0, features, activation_of(activation), combine == "mul");
}

Tensor packed_linear_norm(const Tensor& x, const Tensor& weight, Optional bias, Optional other, Optional norm_weight,
                          Optional norm_bias, int64_t features, double eps) {
  auto function = x.scalar_type() == at::kFloat ? linear_of<float> : linear_of<BFloat16>;
  return function(x, weight, bias, other, norm_weight, norm_bias, true, eps, features, Activation::kNone, false);
}

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

template <typename T>
Tensor attention_of(const Tensor& given, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                    Optional sinks, bool causal) {
  Tensor q = given.stride(3) == 1 ? given : given.contiguous();
  int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  Tensor y = fresh({batch, queries, heads, v.size(3)}, q.options());
  Attention<T> call{};
  call.q = q.const_data_ptr<T>(), call.k = k.const_data_ptr<T>(), call.v = v.const_data_ptr<T>();
  call.q_strides = strides_of(q), call.k_strides = strides_of(k), call.v_strides = strides_of(v);
  Tensor mask, sink;
  if (bias) {
    mask = bias->scalar_type() == at::kBool ? *bias : bias->to(at::kFloat);
    mask = mask.expand({batch, heads, queries, keys});
    if (mask.stride(3) > 1) mask = mask.contiguous();
    if (mask.scalar_type() == at::kBool) call.seen = mask.const_data_ptr<bool>();
    else call.bias = mask.const_data_ptr<float>();
    call.bias_strides = strides_of(mask);
  }
  if (sinks) {
    sink = sinks->to(at::kFloat).expand({batch, heads, queries, 1});
    TORCH_CHECK(sink.stride(2) == 0 || queries == 1, "a sink is one number a head");
    call.sinks = sink.const_data_ptr<float>(), call.sink_batch = sink.stride(0), call.sink_head = sink.stride(1);
  }
  call.y = y.mutable_data_ptr<T>();
  call.batch = batch, call.heads = heads, call.key_heads = k.size(1), call.queries = queries, call.keys = keys;
  call.head_dim = q.size(3), call.value_dim = v.size(3), call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap), call.causal = causal;
  TORCH_CHECK(heads % call.key_heads == 0 && v.size(1) == call.key_heads && k.size(3) == call.head_dim && v.size(2) == keys,
              "key and value heads must divide the query heads");
  if (y.numel() > 0) run(call);
  return y.transpose(1, 2);
}

Tensor fused_attention(const Tensor& q, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                       Optional sinks, bool causal) {
  auto function = q.scalar_type() == at::kFloat ? attention_of<float> : attention_of<BFloat16>;
  return function(q, k, v, bias, scale, softcap, sinks, causal);
}

template <typename T>
Tensor rms_norm_of(const Tensor& given, Optional weight, double eps) {
  Tensor x = given.contiguous(), y = fresh(x.sizes(), x.options());
  Held<T> w(weight, x);
  int64_t n = x.size(-1);
  TORCH_CHECK(!weight || w.tensor.numel() == n, "a norm's weight has one number a feature");
  if (x.numel() > 0)
    rms_norm(x.const_data_ptr<T>(), w.pointer(), y.mutable_data_ptr<T>(), x.numel() / n, n, static_cast<float>(eps));
  return y;
}

Tensor fused_rms_norm(const Tensor& x, Optional weight, double eps) {
  return (x.scalar_type() == at::kFloat ? rms_norm_of<float> : rms_norm_of<BFloat16>)(x, weight, eps);
}

template <typename T>
Tensor rotary_of(const Tensor& given, const Tensor& cos, const Tensor& sin, bool interleaved) {
  Tensor x = given.stride(3) == 1 ? given : given.contiguous();
  int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3), angles = cos.size(-1);
  TORCH_CHECK(head_dim % 2 == 0 && (angles == head_dim || 2 * angles == head_dim) && sin.size(-1) == angles,
              "cos and sin have one number a feature, or one a pair");
  auto spread = [&](const Tensor& table) {
    Tensor rows = table.stride(-1) == 1 ? table : table.contiguous();
    return rows.expand({batch, heads, tokens, angles});
  };
  Tensor c = spread(cos), s = spread(sin);
  Tensor y = fresh({batch, tokens, heads, head_dim}, x.options()).transpose(1, 2);
  if (y.numel() > 0)
    run(Rotary<T>{x.const_data_ptr<T>(), c.const_data_ptr<T>(), s.const_data_ptr<T>(), y.mutable_data_ptr<T>(), strides_of(x),
                  strides_of(c), strides_of(s), strides_of(y), batch, heads, tokens, head_dim, angles, interleaved});
  return y;
}

Tensor fused_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  TORCH_CHECK(cos.scalar_type() == x.scalar_type() && sin.scalar_type() == x.scalar_type(), "cos and sin are of x's dtype");
  return (x.scalar_type() == at::kFloat ? rotary_of<float> : rotary_of<BFloat16>)(x, cos, sin, interleaved);
}

int64_t kernel_features() { return kLanes * 2 + kHasBFloat16; }

}  // namespace

TORCH_LIBRARY_IMPL(lissom, CPU, library) {
  library.impl("packed_linear", packed_linear);
  library.impl("packed_linear_norm", packed_linear_norm);
  library.impl("fused_attention", fused_attention);
  library.impl("fused_rms_norm", fused_rms_norm);
  library.impl("fused_rotary", fused_rotary);
}

TORCH_LIBRARY_FRAGMENT(lissom, library) {
  library.def("kernel_features() -> int", kernel_features);
  library.def("begin_call() -> ()", begin_call);
  library.def("end_call() -> ()", end_call);
}

}  // namespace lissom
