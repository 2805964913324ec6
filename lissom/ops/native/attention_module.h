// What PyTorch calls for the operators of attention.
#pragma once

#include "binding.h"
#include "block_sparse.h"
#include "memory.h"

namespace lissom {
namespace {

// Calls work with what the tensors hold, and yields what it fills.
template <typename T, typename Kept, typename Work>
Tensor with_attention(const Tensor& given, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                      Optional sinks, Work&& work) {
  TORCH_CHECK(given.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention takes [batch, heads, tokens, head_dim]");
  Tensor q = given.stride(3) == 1 ? given : given.contiguous();
  int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  Tensor y = fresh({batch, queries, heads, v.size(3)}, q.options());
  Attention<T, Kept> call{};
  call.q = q.const_data_ptr<T>(), call.k = k.const_data_ptr<Kept>(), call.v = v.const_data_ptr<Kept>();
  call.q_strides = strides_of(q), call.k_strides = strides_of(k), call.v_strides = strides_of(v);
  Tensor mask, sink;
  if (bias) {
    mask = bias->scalar_type() == at::kBool ? *bias : bias->to(at::kFloat);
    if (mask.dim() > 0 && mask.stride(-1) > 1) mask = mask.contiguous();
    mask = mask.expand({batch, heads, queries, keys});
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
  call.softcap = static_cast<float>(softcap);
  TORCH_CHECK(k.size(0) == batch && v.size(0) == batch, "queries, keys and values have the same batch");
  bool alike = v.size(1) == call.key_heads && k.size(3) == call.head_dim && v.size(2) == keys;
  TORCH_CHECK(alike && call.key_heads > 0 && heads % call.key_heads == 0, "key and value heads must divide the query heads");
  if (y.numel() == 0) return y.transpose(1, 2);
  work(call);
  return y.transpose(1, 2);
}

template <typename T, typename Kept>
Tensor attention_of(const Tensor& q, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                    Optional sinks, bool causal, Optional k_scale, Optional v_scale) {
  return with_attention<T, Kept>(q, k, v, bias, scale, softcap, sinks, [&](Attention<T, Kept>& call) {
    call.causal = causal;
    if constexpr (std::is_same_v<T, Kept>) {
      run(call);
    } else {
      TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1, "bytes of a key or value are adjacent");
      Tensor k_scales = k_scale->to(at::kFloat).contiguous(), v_scales = v_scale->to(at::kFloat).contiguous();
      int64_t rows = call.batch * call.key_heads * call.keys;
      TORCH_CHECK(k_scales.numel() == rows && v_scales.numel() == rows, "a scale is one number a key or value");
      call.k_scale = k_scales.const_data_ptr<float>(), call.v_scale = v_scales.const_data_ptr<float>();
      few_rows(call, Sight(call));
    }
  });
}

Tensor fused_attention(const Tensor& q, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                       Optional sinks, bool causal, Optional k_scale, Optional v_scale) {
  TORCH_CHECK(k_scale.has_value() == v_scale.has_value(), "keys and values are both kept in bytes, or neither");
  auto call = [&](auto function, const Tensor& keys, const Tensor& values) {
    return function(q, keys, values, bias, scale, softcap, sinks, causal, k_scale, v_scale);
  };
  if (k_scale && q.size(2) <= kFewRows)
    return by_dtype(q, [&] { return call(attention_of<float, int8_t>, k, v); },
                    [&] { return call(attention_of<BFloat16, int8_t>, k, v); });
  auto floats = [&](const Tensor& kept, Optional by) { return by ? kept.to(at::kFloat).mul(*by).to(q.scalar_type()) : kept; };
  Tensor keys = floats(k, k_scale), values = floats(v, v_scale);
  return by_dtype(q, [&] { return call(attention_of<float, float>, keys, values); },
                  [&] { return call(attention_of<BFloat16, BFloat16>, keys, values); });
}

// Heads are cut and joined by strides alone, here rather than by operators of their own: a small model notices each of those.
Tensor merged_attention(const Tensor& given, Optional bias, int64_t heads, int64_t key_heads, double scale, double softcap,
                        bool causal) {
  TORCH_CHECK(given.dim() == 3 && given.size(2) % (heads + 2 * key_heads) == 0, "attention takes [batch, tokens, all heads]");
  Tensor x = given.contiguous();
  int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), head_dim = width / (heads + 2 * key_heads);
  auto part = [&](int64_t first, int64_t count) {
    return x.as_strided({batch, count, tokens, head_dim}, {tokens * width, head_dim, width, 1},
                        x.storage_offset() + first * head_dim);
  };
  Tensor y = fused_attention(part(0, heads), part(heads, key_heads), part(heads + key_heads, key_heads), bias, scale, softcap,
                             {}, causal, {}, {});
  return y.transpose(1, 2).view({batch, tokens, heads * head_dim});
}

constexpr size_t kFields = 7;  // of a condition as an operator takes it: the number of its alternative, and its own six

Pattern pattern_of(at::IntArrayRef values, int64_t block, Optional given, const Tensor& layout, int64_t heads) {
  Pattern pattern;
  TORCH_CHECK(values.size() % kFields == 0 && block >= 1, "a pattern has seven numbers a condition, and blocks of a token or more");
  int64_t number = -1;
  bool asks = false;
  for (size_t n = 0; n < values.size(); n += kFields) {
    if (pattern.alternatives.empty() || values[n] != number) pattern.alternatives.emplace_back();
    number = values[n];
    Condition condition{values[n + 1], values[n + 2], values[n + 3], values[n + 4], values[n + 5], values[n + 6]};
    TORCH_CHECK(std::abs(condition.query) <= 1 && std::abs(condition.key) <= 1 && condition.unit >= 1 && condition.modulus >= 0,
                "a condition multiplies positions with -1, 0 or 1, in units of a token or more");
    asks |= condition.asks_layout();
    pattern.alternatives.back().push_back(condition);
  }
  pattern.block = block;
  TORCH_CHECK(given.has_value() || !asks, "this pattern asks a layout, and none was given");
  if (!given) return pattern;
  TORCH_CHECK(layout.dim() == 3 && layout.scalar_type() == at::kBool && layout.numel() > 0 &&
                  (layout.size(0) == 1 || layout.size(0) == heads),
              "a layout is boolean, [heads or 1, query blocks, key blocks]");
  pattern.layout = layout.const_data_ptr<bool>();
  pattern.heads = layout.size(0), pattern.rows = layout.size(1), pattern.columns = layout.size(2);
  return pattern;
}

Tensor block_sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v, Optional bias, Optional layout,
                              at::IntArrayRef pattern, int64_t block, double scale, double softcap, Optional sinks) {
  Tensor table = layout ? layout->contiguous() : Tensor();
  auto call = [&](auto zero) {
    using T = decltype(zero);
    return with_attention<T, T>(q, k, v, bias, scale, softcap, sinks, [&](Attention<T>& found) {
      run(BlockSparse<T>{found, pattern_of(pattern, block, layout, table, found.heads)});
    });
  };
  return by_dtype(q, [&] { return call(float{}); }, [&] { return call(BFloat16{}); });
}

}  // namespace
}  // namespace lissom
