// Registers the CPU kernels of `lissom::` operators; each is checked against the reference in lissom/ops.
#include "attention_module.h"
#include "linear.h"
#include "meeting.h"
#include "memory.h"
#include "rounded.h"
#include "rows.h"
#include "stored.h"

#include <torch/library.h>

#include <string_view>

namespace lissom {
namespace {

Activation activation_of(c10::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK(false, "a linear layer's kernel has no activation '", std::string(name), "'");
}

template <typename T>
struct Held {  // keeps a contiguous tensor of the call's dtype alive, and points into it
  Tensor tensor;
  Held(Optional given, const Tensor& like) {
    if (given) tensor = given->to(like.scalar_type()).contiguous();
  }
  const T* pointer() const { return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr; }
};

// What a linear layer's kernel does beside the product.
struct Around {
  Optional bias, other, norm_weight, norm_bias;
  int64_t features;
  Activation activation = Activation::kNone;
  bool multiplies = false, norms = false;
  double eps = 0;
};

template <typename T, typename Source>
Tensor linear_of(const Tensor& x, const Source& source, const Around& around) {
  auto sizes = x.sizes().vec();
  sizes.back() = around.features;
  Tensor y = fresh(sizes, x.options());
  Held<T> b(around.bias, x), o(around.other, x), nw(around.norm_weight, x), nb(around.norm_bias, x);
  TORCH_CHECK(!around.other || o.tensor.numel() == y.numel(), "what is added to the product has its shape");
  for (const auto& item : {b, nw, nb})
    TORCH_CHECK(!item.tensor.defined() || item.tensor.numel() == around.features, "a bias or a norm has one number a feature");
  if (y.numel() == 0) return y;
  run(Linear<T>{b.pointer(), o.pointer(), y.mutable_data_ptr<T>(), y.numel() / around.features, around.features,
                around.activation, around.multiplies, nw.pointer(), nb.pointer(), around.norms, static_cast<float>(around.eps)},
      source);
  return y;
}

template <typename T>
Tensor plain_of(const Tensor& given, const Tensor& weight, const Around& around) {
  Tensor x = given.contiguous();
  int64_t inputs = x.size(-1);
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == x.scalar_type(), "a packed weight is of the input's dtype");
  TORCH_CHECK(weight.numel() == ceil_div(around.features, kPanel) * kPanel * inputs, "a packed weight holds inputs x features");
  return linear_of<T>(x, Plain<T>{x.const_data_ptr<T>(), weight.const_data_ptr<T>(), inputs}, around);
}

Tensor plain(const Tensor& x, const Tensor& weight, const Around& around) {
  return by_dtype(x, [&] { return plain_of<float>(x, weight, around); }, [&] { return plain_of<BFloat16>(x, weight, around); });
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, Optional bias, Optional other, int64_t features,
                     c10::string_view activation, c10::string_view combine) {
  return plain(x, weight, {bias, other, {}, {}, features, activation_of(activation), combine == "mul"});
}

Tensor packed_linear_norm(const Tensor& x, const Tensor& weight, Optional bias, Optional other, Optional norm_weight,
                          Optional norm_bias, int64_t features, double eps) {
  return plain(x, weight, {bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps});
}

// How a quantized layer's weight is kept, and how x is rounded.
struct Bytes {
  const Tensor &weight, &scale, &sums;
  Optional x_scale, x_zero_point;
  c10::string_view granularity;
};

template <typename T>
Tensor rounded_of(const Tensor& given, const Bytes& bytes, const Around& around) {
  Tensor x = given.contiguous();
  int64_t inputs = x.size(-1), padded = ceil_div(inputs, 4) * 4, columns = ceil_div(around.features, kPanel) * kPanel;
  TORCH_CHECK(bytes.weight.is_contiguous() && bytes.weight.numel() == columns * padded, "a packed weight holds inputs x features");
  for (const Tensor& item : {bytes.scale, bytes.sums})
    TORCH_CHECK(item.is_contiguous() && item.numel() == columns, "scales and sums have one number a packed feature");
  TORCH_CHECK(bytes.granularity == "token" || bytes.granularity == "tensor", "x is rounded by token or by tensor");
  Rounded<T> source{x.const_data_ptr<T>(), bytes.weight.const_data_ptr<int8_t>(), bytes.scale.const_data_ptr<float>(),
                    bytes.sums.const_data_ptr<int32_t>(), x.numel() / std::max<int64_t>(inputs, 1), inputs, padded,
                    bytes.granularity == "token" ? Rounding::kToken : Rounding::kTensor, Grid{}};
  if (bytes.x_scale) {
    float scale = bytes.x_scale->item<float>();
    source.rounding = Rounding::kKnown;
    source.grid = {scale, 1.0f / scale, bytes.x_zero_point ? bytes.x_zero_point->item<int32_t>() : 0};
  }
  if (inputs > 0) source.measure();
  return linear_of<T>(x, source, around);
}

Tensor rounded(const Tensor& x, const Bytes& bytes, const Around& around) {
  return by_dtype(x, [&] { return rounded_of<float>(x, bytes, around); }, [&] { return rounded_of<BFloat16>(x, bytes, around); });
}

Tensor quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& sums, Optional x_scale,
                        Optional x_zero_point, Optional bias, Optional other, int64_t features, c10::string_view granularity,
                        c10::string_view activation, c10::string_view combine) {
  return rounded(x, {weight, scale, sums, x_scale, x_zero_point, granularity},
                 {bias, other, {}, {}, features, activation_of(activation), combine == "mul"});
}

Tensor quantized_linear_norm(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& sums, Optional x_scale,
                             Optional x_zero_point, Optional bias, Optional other, Optional norm_weight, Optional norm_bias,
                             int64_t features, c10::string_view granularity, double eps) {
  return rounded(x, {weight, scale, sums, x_scale, x_zero_point, granularity},
                 {bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps});
}

Form form_of(c10::string_view format) {
  if (format == "int8") return Form::kInt8;
  if (format == "uint8") return Form::kUint8;
  if (format == "int4") return Form::kInt4;
  if (format == "uint4") return Form::kUint4;
  TORCH_CHECK(false, "weights are stored in eight or four bits, not in '", std::string(format), "'");
}

template <typename T>
Tensor stored_of(const Tensor& given, const StoredWeight& weight, const Around& around) {
  Tensor x = given.contiguous();
  TORCH_CHECK(weight.inputs % kPair<T> == 0, "bfloat16 takes two inputs at once");
  return linear_of<T>(x, Stored<T>{x.const_data_ptr<T>(), weight, x.numel() / std::max<int64_t>(weight.inputs, 1)}, around);
}

Tensor stored(const Tensor& x, const Tensor& q, const Tensor& scale, Optional zero_point, c10::string_view format,
              const Around& around) {
  int64_t columns = ceil_div(around.features, kPanel) * kPanel, groups = scale.size(0), inputs = x.size(-1);
  Form form = form_of(format);
  int64_t bytes = inputs * columns / kPanel * step_bytes(form);
  TORCH_CHECK(q.is_contiguous() && q.numel() == bytes, "a packed weight holds inputs x features");
  TORCH_CHECK(scale.is_contiguous() && scale.numel() == groups * columns && groups > 0 && inputs % groups == 0,
              "scales are [groups, packed features]");
  bool half = scale.scalar_type() == at::kHalf;
  TORCH_CHECK(half || scale.scalar_type() == at::kFloat, "scales are float16 or float32");
  if (zero_point)
    TORCH_CHECK(zero_point->is_contiguous() && zero_point->sizes() == scale.sizes() && zero_point->scalar_type() == at::kByte,
                "zero points are like scales, in bytes");
  StoredWeight weight{static_cast<const uint8_t*>(q.const_data_ptr()), form, scale.const_data_ptr(), half,
                      zero_point ? zero_point->const_data_ptr<uint8_t>() : nullptr, inputs, groups, columns};
  return by_dtype(x, [&] { return stored_of<float>(x, weight, around); }, [&] { return stored_of<BFloat16>(x, weight, around); });
}

Tensor weight_quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, Optional zero_point, Optional bias,
                               Optional other, int64_t features, c10::string_view format, c10::string_view activation,
                               c10::string_view combine) {
  return stored(x, weight, scale, zero_point, format,
                {bias, other, {}, {}, features, activation_of(activation), combine == "mul"});
}

Tensor weight_quantized_linear_norm(const Tensor& x, const Tensor& weight, const Tensor& scale, Optional zero_point,
                                    Optional bias, Optional other, Optional norm_weight, Optional norm_bias, int64_t features,
                                    c10::string_view format, double eps) {
  return stored(x, weight, scale, zero_point, format,
                {bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps});
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
  return by_dtype(x, [&] { return rms_norm_of<float>(x, weight, eps); }, [&] { return rms_norm_of<BFloat16>(x, weight, eps); });
}

template <typename T>
Tensor rotary_of(const Tensor& given, const Tensor& cos, const Tensor& sin, bool interleaved) {
  TORCH_CHECK(given.dim() == 4, "a rotation takes [batch, heads, tokens, head_dim]");
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
  auto call = [&](auto function) { return function(x, cos, sin, interleaved); };
  return by_dtype(x, [&] { return call(rotary_of<float>); }, [&] { return call(rotary_of<BFloat16>); });
}

// Rows of a packed weight: what lies `stride` bytes apart in it, brought together.
Tensor packed_embedding(const Tensor& weight, const Tensor& indices, int64_t features, int64_t bits) {
  TORCH_CHECK(weight.is_contiguous() && weight.dim() >= 3 && weight.dim() <= 4, "a packed weight holds panels");
  Tensor rows = indices.to(at::kLong).contiguous();
  bool halves = bits == 4;
  int64_t steps = weight.size(1), pair = weight.dim() == 4 ? weight.size(3) : 1, width = pair * weight.element_size();
  int64_t stride = weight.size(2) * width;
  TORCH_CHECK(!halves || (width == 1 && weight.size(2) == kPanel / 2 && steps % 2 == 0), "four bits are packed by two");
  std::vector<int64_t> sizes = indices.sizes().vec();
  sizes.push_back(halves ? steps / 2 : steps * pair);
  Tensor found = at::empty(sizes, weight.options());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(found.mutable_data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < features, "index out of range in packed_embedding, which has rows 0 to ", features - 1);
    const char* place = from + row[i] / kPanel * steps * stride;
    int64_t column = row[i] % kPanel;
    if (halves) {
      int shift = column < kPanel / 2 ? 0 : 4;
      place += column % (kPanel / 2);
      for (int64_t step = 0; step < steps; step += 2, place += 2 * stride)
        *to++ = ((place[0] >> shift) & 15) | (((place[stride] >> shift) & 15) << 4);
    } else {
      place += column * width;
      for (int64_t step = 0; step < steps; ++step, place += stride, to += width) std::memcpy(to, place, width);
    }
  }
  return found;
}

bool has_bfloat16() { return kHasBFloat16; }
bool has_bytes() { return kHasBytes; }
bool has_stored() { return kHasStored; }

}  // namespace

TORCH_LIBRARY_IMPL(lissom, CPU, library) {
  library.impl("packed_linear", packed_linear);
  library.impl("packed_linear_norm", packed_linear_norm);
  library.impl("packed_embedding", packed_embedding);
  if (kHasBytes) {
    library.impl("quantized_linear", quantized_linear);
    library.impl("quantized_linear_norm", quantized_linear_norm);
  }
  if (kHasStored) {
    library.impl("weight_quantized_linear", weight_quantized_linear);
    library.impl("weight_quantized_linear_norm", weight_quantized_linear_norm);
  }
  library.impl("fused_attention", fused_attention);
  library.impl("merged_attention", merged_attention);
  library.impl("block_sparse_attention", block_sparse_attention);
  library.impl("fused_rms_norm", fused_rms_norm);
  library.impl("fused_rotary", fused_rotary);
}

TORCH_LIBRARY_FRAGMENT(lissom, library) {
  library.def("has_bfloat16() -> bool", has_bfloat16);
  library.def("has_bytes() -> bool", has_bytes);
  library.def("has_stored() -> bool", has_stored);
  library.def("begin_call() -> ()", begin_call);
  library.def("end_call() -> ()", end_call);
  library.def("meet(Tensor steps, int rank, int step, float seconds) -> bool", meet);
}

}  // namespace lissom
