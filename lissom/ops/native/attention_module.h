// The implementations of the attention operators.
#pragma once

#include "block_sparse.h"
#include "checks.h"
#include "memory.h"
#include "views.h"

#include <cmath>
#include <functional>
#include <vector>

namespace lissom {
namespace {

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// Raises unless the operands of an attention fit each other. cache_dtype: of keys and values.
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                     Optional sinks, at::ScalarType cache_dtype) {
  check_readable(q, "q"), check_readable(k, "k"), check_readable(v, "v");
  check_readable(bias, "bias"), check_readable(sinks, "sinks");
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v have ", q.dim(), ", ", k.dim(), " and ", v.dim(),
              " dimensions, and must be [batch, heads, tokens, head_dim]");
  for (const Tensor& item : {q, k, v})
    for (int64_t size : item.sizes()) check_size(size, "a size of q, k or v");
  check_dtype(k, cache_dtype, "k"), check_dtype(v, cache_dtype, "v");
  bool alike = k.size(0) == q.size(0) && v.size(0) == q.size(0) && v.size(1) == k.size(1) && k.size(3) == q.size(3) &&
               v.size(2) == k.size(2);
  TORCH_CHECK(alike && k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(),
              " must have the same batch, q and k the same head_dim, k and v the same heads and keys, and key and value heads "
              "must divide the query heads");
  TORCH_CHECK(std::isfinite(static_cast<float>(scale)) && std::isfinite(static_cast<float>(softcap)), "scale ", scale,
              " and softcap ", softcap, " must be finite");
  std::vector<int64_t> scores{q.size(0), q.size(1), q.size(2), k.size(2)};
  TORCH_CHECK(!bias || (!bias->is_complex() && bias->broadcasts(scores)),
              "a bias is boolean or real and broadcasts to the scores, ", at::IntArrayRef(scores));
  scores[3] = 1;
  TORCH_CHECK(!sinks || (sinks->is_floating_point() && sinks->broadcasts(scores) &&
                         (sinks->dim() < 2 || sinks->size(-2) == 1)),
              "sinks are floating, one number a head: they broadcast to [batch, heads, 1, 1]");
}

// Sets the bias or the mask of a call whose scores have these sizes; returns the memory that it reads.
template <typename T, typename Cache>
Tensor set_bias(Attention<T, Cache>& call, Optional bias, at::IntArrayRef scores) {
  if (!bias) return {};
  Tensor mask = bias->scalar_type() == at::kBool ? *bias : bias->to(at::kFloat);
  if (mask.dim() > 0 && mask.stride(-1) > 1) mask = mask.contiguous();
  mask = mask.expand(scores);
  if (mask.scalar_type() == at::kBool) call.mask = mask.const_data_ptr<bool>();
  else call.bias = mask.const_data_ptr<float>();
  call.bias_strides = strides_of(mask);
  return mask;
}

// Calls `work` with the pointers and strides of the operands; returns the output that it fills.
template <typename T, typename Cache, typename Work>
Tensor with_attention(const Tensor& given, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                      Optional sinks, Work&& work) {
  check_attention(given, k, v, bias, scale, softcap, sinks, c10::CppTypeToScalarType<Cache>::value);
  Tensor q = given.stride(3) == 1 ? given : given.contiguous();
  int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  Tensor y = allocate({batch, queries, heads, v.size(3)}, q.options());
  Attention<T, Cache> call{};
  call.q = q.const_data_ptr<T>(), call.k = k.const_data_ptr<Cache>(), call.v = v.const_data_ptr<Cache>();
  call.q_strides = strides_of(q), call.k_strides = strides_of(k), call.v_strides = strides_of(v);
  Tensor mask = set_bias(call, bias, {batch, heads, queries, keys}), sink;
  if (sinks) {
    sink = sinks->to(at::kFloat).expand({batch, heads, queries, 1});
    call.sinks = sink.const_data_ptr<float>(), call.sink_batch = sink.stride(0), call.sink_head = sink.stride(1);
  }
  call.y = y.mutable_data_ptr<T>();
  call.batch = batch, call.heads = heads, call.key_heads = k.size(1), call.queries = queries, call.keys = keys;
  call.head_dim = q.size(3), call.value_dim = v.size(3), call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap);
  if (y.numel() == 0) return y.transpose(1, 2);
  work(call);
  return y.transpose(1, 2);
}

template <typename T, typename Cache>
Tensor attention_of(const Tensor& q, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                    Optional sinks, bool causal, Optional k_scale, Optional v_scale) {
  return with_attention<T, Cache>(q, k, v, bias, scale, softcap, sinks, [&](Attention<T, Cache>& call) {
    if (causal) call.band = Band::causal();
    if constexpr (std::is_same_v<T, Cache>) {
      run(call);
    } else {
      Tensor k_scales = k_scale->to(at::kFloat).contiguous(), v_scales = v_scale->to(at::kFloat).contiguous();
      call.k_scale = k_scales.const_data_ptr<float>(), call.v_scale = v_scales.const_data_ptr<float>();
      few_rows(call, VisibleKeys(call));
    }
  });
}

Tensor fused_attention(const Tensor& q, const Tensor& k, const Tensor& v, Optional bias, double scale, double softcap,
                       Optional sinks, bool causal, Optional k_scale, Optional v_scale) {
  TORCH_CHECK(k_scale.has_value() == v_scale.has_value(), "k_scale and v_scale must be given together");
  if (k_scale) {
    TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v have ", q.dim(), ", ", k.dim(), " and ", v.dim(),
                " dimensions, and must be [batch, heads, tokens, head_dim]");
    check_readable(k, "k"), check_readable(v, "v");
    check_dtype(k, at::kChar, "k"), check_dtype(v, at::kChar, "v");
    for (Optional scales : {std::cref(k_scale), std::cref(v_scale)})
      check_floats(scales, {k.size(0), k.size(1), k.size(2), 1}, "a scale of keys or values");
  }
  if (k_scale && q.size(2) <= kFewRows && k.stride(-1) == 1 && v.stride(-1) == 1)
    return by_dtype(q, [&](auto zero) {
      return attention_of<decltype(zero), int8_t>(q, k, v, bias, scale, softcap, sinks, causal, k_scale, v_scale);
    });
  auto floats = [&](const Tensor& kept, Optional by) { return by ? kept.to(at::kFloat).mul(*by).to(q.scalar_type()) : kept; };
  Tensor keys = floats(k, k_scale), values = floats(v, v_scale);
  return by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    return attention_of<T, T>(q, keys, values, bias, scale, softcap, sinks, causal, {}, {});
  });
}

// The features of a head of a merged projection, which is checked: [batch, tokens, all heads].
int64_t head_dim_of(const Tensor& qkv, int64_t heads, int64_t key_heads) {
  check_readable(qkv, "qkv");
  TORCH_CHECK(qkv.dim() == 3, "qkv has ", qkv.dim(), " dimensions, and must be [batch, tokens, all heads]");
  for (int64_t size : qkv.sizes()) check_size(size, "a size of qkv");
  bool fits = heads > 0 && key_heads > 0 && heads <= qkv.size(2) && key_heads <= qkv.size(2);
  TORCH_CHECK(fits && qkv.size(2) % (heads + 2 * key_heads) == 0, "qkv has ", qkv.size(2), " features, and must have some for ",
              "each of ", heads, " heads and twice ", key_heads, " key heads");
  return qkv.size(2) / (heads + 2 * key_heads);
}

// Heads are split and merged by strides, here rather than by separate operators, whose overhead is noticeable in a small model.
Tensor merged_attention(const Tensor& given, Optional bias, int64_t heads, int64_t key_heads, double scale, double softcap,
                        bool causal) {
  int64_t head_dim = head_dim_of(given, heads, key_heads);
  Tensor x = given.contiguous();
  int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  auto part = [&](int64_t first, int64_t count) {
    return x.strided({batch, count, tokens, head_dim}, {tokens * width, head_dim, width, 1}, first * head_dim);
  };
  Tensor y = fused_attention(part(0, heads), part(heads, key_heads), part(heads + key_heads, key_heads), bias, scale, softcap,
                             {}, causal, {}, {});
  return y.transpose(1, 2).view({batch, tokens, heads * head_dim});
}

// One call for each text whose rows are asked for, where its queries and its visible keys are neighbours in memory, as pack-tokens
// leaves them, and one mask holds for all its queries; else none. whole: what the calls share, with the mask of all texts.
template <typename T>
std::vector<Attention<T>> calls_of_texts(const Attention<T>& whole, const Tensor& slot_table, const Tensor& row_table) {
  int64_t batch = slot_table.size(0), tokens = slot_table.size(1), count = row_table.size(0);
  const int64_t *slots = slot_table.const_data_ptr<int64_t>(), *rows = row_table.const_data_ptr<int64_t>();
  auto neighbours = [](auto&& place, int64_t from, int64_t to) {
    for (int64_t n = from + 1; n < to; ++n)
      if (place(n) != place(n - 1) + 1) return false;
    return true;
  };
  std::vector<Attention<T>> found;
  int64_t taken = 0;
  for (int64_t b = 0; b < batch && taken < count; ++b) {
    int64_t first = taken;
    while (taken < count && rows[taken] / tokens == b && (taken == first || rows[taken] > rows[taken - 1])) ++taken;
    if (taken == first) continue;
    auto position = [&](int64_t n) { return rows[n] % tokens; };
    auto query = [&](int64_t n) { return slots[rows[n]]; };
    auto key = [&](int64_t n) { return slots[b * tokens + n]; };
    Attention<T> call = whole;
    if (call.mask) call.mask += b * whole.bias_strides.batch;
    if (call.bias) call.bias += b * whole.bias_strides.batch;
    call.batch = 1, call.queries = 1, call.band = Band();  // the mask lets all queries see the same keys
    VisibleKeys visible(call);
    Span seen{0, 0};
    for (int64_t h = 0; h < call.heads; ++h) seen = joined(seen, visible.of(0, h, 0));
    bool ordered = !whole.band.narrows() || neighbours(position, first, taken);
    if (!ordered || !neighbours(query, first, taken) || !neighbours(key, seen.begin, seen.end)) return {};
    call.queries = taken - first, call.band = whole.band.after(position(first));
    call.q += query(first) * whole.q_strides.row, call.y += first * call.heads * call.value_dim;
    int64_t ahead = seen.begin < seen.end ? key(seen.begin) - seen.begin : 0;
    call.k += ahead * whole.k_strides.row, call.v += ahead * whole.v_strides.row;
    found.push_back(call);
  }
  return taken == count ? found : std::vector<Attention<T>>{};
}

// Tokens of several texts without padding, [1, heads, tokens of all, head_dim]. slots: [batch, tokens of a padded text], the token at
// each position; rows: the positions, over all texts, whose results are returned. Query i of a text sees keys i + low to i + high.
Tensor unpadded_attention(const Tensor& given, const Tensor& k, const Tensor& v, const Tensor& slots_given, const Tensor& rows_given,
                          Optional bias, double scale, double softcap, std::optional<int64_t> low, std::optional<int64_t> high) {
  check_attention(given, k, v, {}, scale, softcap, {}, given.scalar_type());
  Tensor slots = checked_indices(slots_given), rows = checked_indices(rows_given);
  TORCH_CHECK(given.size(0) == 1 && k.size(2) == given.size(2) && slots.dim() == 2 && rows.dim() == 1, "q ", given.sizes(), ", k ",
              k.sizes(), ", slots ", slots.sizes(), " and rows ", rows.sizes(),
              " must be [1, heads, tokens of all texts, head_dim], the same, [batch, tokens] and [rows]");
  for (const Tensor& item : {slots, rows})
    for (int64_t size : item.sizes()) check_size(size, "a size of slots or rows");
  int64_t batch = slots.size(0), tokens = slots.size(1), count = rows.size(0), heads = given.size(1), value_dim = v.size(3);
  auto check_indices = [](const Tensor& indices, int64_t limit, const char* name) {
    const int64_t* values = indices.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < indices.numel(); ++n)
      TORCH_CHECK_INDEX(values[n] >= 0 && values[n] < limit, name, " holds ", values[n], ", and must be from 0 to ", limit - 1);
  };
  check_indices(slots, given.size(2), "slots"), check_indices(rows, slots.numel(), "rows");
  check_readable(bias, "bias");
  std::vector<int64_t> scores{batch, heads, tokens, tokens};
  TORCH_CHECK(!bias || (!bias->is_complex() && bias->broadcasts(scores)), "a bias is boolean or real and broadcasts to the scores, ",
              at::IntArrayRef(scores));
  Band band;
  if (low) band.low = std::clamp(*low, -Band::kFar, Band::kFar);
  if (high) band.high = std::clamp(*high, -Band::kFar, Band::kFar);
  return by_dtype(given, [&](auto zero) {
    using T = decltype(zero);
    Tensor q = given.stride(3) == 1 ? given : given.contiguous(), y = allocate({1, count, heads, value_dim}, q.options());
    if (y.numel() == 0) return y.transpose(1, 2);
    Attention<T> whole{};
    whole.q = q.const_data_ptr<T>(), whole.k = k.const_data_ptr<T>(), whole.v = v.const_data_ptr<T>();
    whole.q_strides = strides_of(q), whole.k_strides = strides_of(k), whole.v_strides = strides_of(v);
    Tensor mask = set_bias(whole, bias, scores);
    whole.y = y.mutable_data_ptr<T>();
    whole.heads = heads, whole.key_heads = k.size(1), whole.keys = tokens, whole.head_dim = q.size(3), whole.value_dim = value_dim;
    whole.scale = static_cast<float>(scale), whole.softcap = static_cast<float>(softcap), whole.band = band;
    if (!bias || ((whole.bias_strides.row == 0 || tokens == 1) && whole.bias_strides.column == 1)) {
      whole.bias_strides.row = 0;
      if (std::vector<Attention<T>> calls = calls_of_texts(whole, slots, rows); !calls.empty()) {
        run(calls);
        return y.transpose(1, 2);
      }
    }
    auto padded = [&](const Tensor& x) {
      Tensor found = index_select(x.transpose(1, 2), 1, slots.view(slots.numel()));
      return found.view({batch, tokens, x.size(1), x.size(3)}).transpose(1, 2);
    };
    Tensor all = with_attention<T, T>(padded(q), padded(k), padded(v), bias, scale, softcap, {}, [&](Attention<T>& call) {
      call.band = band;
      run(call);
    });
    return index_select(all.transpose(1, 2).view({1, batch * tokens, heads, value_dim}), 1, rows).transpose(1, 2);
  });
}

constexpr size_t kFields = 7;  // of a condition in an operator's argument: the number of its alternative, and its six fields

Pattern pattern_of(at::IntArrayRef values, int64_t block, Optional given, const Tensor& layout, int64_t heads) {
  Pattern pattern;
  TORCH_CHECK(values.size() % kFields == 0, "a pattern has ", values.size(), " numbers, and must have seven a condition");
  TORCH_CHECK(block >= 1 && block <= kLargestSize, "a pattern's block is ", block, " tokens, and must be from 1 to ", kLargestSize);
  int64_t number = -1;
  bool needs_layout = false;
  for (size_t n = 0; n < values.size(); n += kFields) {
    TORCH_CHECK(n == 0 || values[n] >= number, "a pattern's alternatives are numbered in order, and ", values[n],
                " follows ", number);
    if (pattern.alternatives.empty() || values[n] != number) pattern.alternatives.emplace_back();
    number = values[n];
    Condition condition{values[n + 1], values[n + 2], values[n + 3], values[n + 4], values[n + 5], values[n + 6]};
    for (int64_t factor : {condition.query, condition.key})
      TORCH_CHECK(factor >= -1 && factor <= 1, "a condition multiplies positions with -1, 0 or 1, not ", factor);
    for (int64_t bound : {condition.low, condition.high})
      TORCH_CHECK(bound >= -kLargestSize && bound <= kLargestSize, "a condition's bound is ", bound, ", and must fit in 32 bits");
    TORCH_CHECK(condition.unit >= 1 && condition.unit <= kLargestSize, "a condition's unit is ", condition.unit,
                " tokens, and must be from 1 to ", kLargestSize);
    constexpr int64_t kLargestModulus = int64_t(1) << 30;  // the sum of two remainders fits in 32 bits
    TORCH_CHECK(condition.modulus >= 0 && condition.modulus <= kLargestModulus, "a condition's modulus is ", condition.modulus,
                ", and must be from 0 to ", kLargestModulus);
    needs_layout |= condition.reads_layout();
    pattern.alternatives.back().push_back(condition);
  }
  pattern.block = block;
  TORCH_CHECK(given.has_value() || !needs_layout, "this pattern needs a layout, and none was given");
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
  check_readable(layout, "layout"), check_readable(q, "q"), check_readable(k, "k"), check_readable(v, "v");
  if (q.scalar_type() == at::kHalf && k.scalar_type() == at::kHalf && v.scalar_type() == at::kHalf)  // computed in float32
    return block_sparse_attention(q.to(at::kFloat), k.to(at::kFloat), v.to(at::kFloat), bias, layout, pattern, block, scale,
                                  softcap, sinks).to(at::kHalf);
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k have ", q.dim(), " and ", k.dim(), " dimensions, and must have four");
  TORCH_CHECK(q.size(2) <= kLargestSize - k.size(2), "a pattern has ", q.size(2), " queries and ", k.size(2),
              " keys, and may have ", kLargestSize, " together");
  Tensor table = layout ? layout->contiguous() : Tensor();
  Pattern said = pattern_of(pattern, block, layout, table, q.size(1));
  return by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    return with_attention<T, T>(q, k, v, bias, scale, softcap, sinks,
                                [&](Attention<T>& found) { run(BlockSparse<T>{found, said}); });
  });
}

}  // namespace
}  // namespace lissom
