// Registers the CPU kernels of `lissom::` operators; each is checked against the reference in lissom/ops.
#include "attention_module.h"
#include "linear.h"
#include "amx_blocks.h"
#include "amx_groups.h"
#include "amx_weights.h"
#include "barrier.h"
#include "divergence.h"
#include "fake_quantize_module.h"
#include "memory.h"
#include "quantized.h"
#include "recurrence_module.h"
#include "rows.h"
#include "chain.h"
#include "views.h"
#include "weight_quantized.h"

#include <string>
#include <string_view>

namespace lissom {
namespace {

Activation activation_of(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  if (name == "squared_relu") return Activation::kSquaredRelu;
  TORCH_CHECK(false, "a linear layer's kernel has no activation '", std::string(name), "'");
}

template <typename T>
struct Converted {  // owns a contiguous copy of an optional tensor in the call's dtype
  Tensor tensor;
  Converted(Optional given, const Tensor& like) {
    if (given) tensor = given->to(like.scalar_type()).contiguous();
  }
  const T* pointer() const { return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr; }
};

// The operations fused after the product of a linear layer.
struct Epilogue {
  Optional bias, other, norm_weight, norm_bias;
  int64_t features;
  Activation activation = Activation::kNone;
  bool multiplies = false, norms = false;
  double eps = 0;
};

// Raises unless x and the operands of the epilogue fit each other.
void check_linear(const Tensor& x, const Epilogue& epilogue) {
  check_readable(x, "x");
  TORCH_CHECK(x.dim() >= 1, "x is a scalar, and must be [..., inputs]");
  check_size(x.size(-1), "the number of inputs"), check_size(epilogue.features, "the number of features");
  check_floats(epilogue.bias, epilogue.features, "a bias");
  check_floats(epilogue.norm_weight, epilogue.features, "a norm's weight");
  check_floats(epilogue.norm_bias, epilogue.features, "a norm's bias");
  if (!epilogue.other) return;
  auto sizes = x.sizes().vec();
  sizes.back() = epilogue.features;
  check_floats(epilogue.other, sizes, "the other operand");
}

bool multiplies(std::string_view combine) {
  TORCH_CHECK(combine == "add" || combine == "mul", "combine is 'add' or 'mul', not '", std::string(combine), "'");
  return combine == "mul";
}

int64_t packed_features(const Epilogue& epilogue) { return ceil_div(epilogue.features, kPanel) * kPanel; }

template <typename T, typename Source>
Tensor linear_of(const Tensor& x, const Source& source, const Epilogue& epilogue) {
  auto sizes = x.sizes().vec();
  sizes.back() = epilogue.features;
  Tensor y = allocate(sizes, x.options());
  Converted<T> b(epilogue.bias, x), o(epilogue.other, x), nw(epilogue.norm_weight, x), nb(epilogue.norm_bias, x);
  if (y.numel() == 0) return y;
  run(Linear<T>{b.pointer(), o.pointer(), y.mutable_data_ptr<T>(), y.numel() / epilogue.features, epilogue.features,
                epilogue.activation, epilogue.multiplies, epilogue.norms,
                RowNorm<T>{nw.pointer(), nb.pointer(), epilogue.features, static_cast<float>(epilogue.eps)}},
      source);
  return y;
}

// Whether x has rows enough for tiles.
bool by_amx(const Tensor& x, int64_t fewest = kFewestAmxRows) {
  return amx.load(std::memory_order_relaxed) && x.numel() >= fewest * std::max<int64_t>(x.size(-1), 1);
}

template <typename T>
Tensor plain_of(const Tensor& given, const Tensor& weight, const Epilogue& epilogue) {
  check_linear(given, epilogue);
  int64_t inputs = given.size(-1), panels = ceil_div(epilogue.features, kPanel);
  TORCH_CHECK(inputs % kPair<T> == 0, "there are ", inputs, " inputs, and bfloat16 takes an even number");
  std::vector<int64_t> sizes{panels, inputs / kPair<T>, kPanel};
  if (kPair<T> > 1) sizes.push_back(kPair<T>);
  check_exact(weight, sizes, given.scalar_type(), "a packed weight");
  Tensor x = given.contiguous();
  const T *from = x.const_data_ptr<T>(), *packed = weight.const_data_ptr<T>();
  if constexpr (std::is_same_v<T, BFloat16>)
    if (by_amx(x, 1)) return linear_of<T>(x, Tiled<Plain<T>>{{from, packed, inputs}, inputs}, epilogue);
  return with_operand<T>([&](auto zero) {
    if constexpr (std::is_same_v<T, decltype(zero)>) return linear_of<T>(x, Plain<T>{from, packed, inputs}, epilogue);
    else return linear_of<T>(x, Widened{from, packed, inputs}, epilogue);
  });
}

Tensor plain(const Tensor& x, const Tensor& weight, const Epilogue& epilogue) {
  return by_dtype(x, [&](auto zero) { return plain_of<decltype(zero)>(x, weight, epilogue); });
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, Optional bias, Optional other, int64_t features,
                     std::string_view activation, std::string_view combine) {
  return plain(x, weight, {bias, other, {}, {}, features, activation_of(activation), multiplies(combine)});
}

Tensor packed_linear_norm(const Tensor& x, const Tensor& weight, Optional bias, Optional other, Optional norm_weight,
                          Optional norm_bias, int64_t features, double eps) {
  return plain(x, weight, {bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps});
}

// The blocks of a weight that are stored. Raises unless they fit the inputs and features: kernels read x at their places.
StoredBlocks blocks_of(const Tensor& weight, const Tensor& places, const Tensor& ends, at::ScalarType type, int64_t inputs, int64_t features) {
  check_readable(weight, "the blocks of a weight");
  int64_t stored = weight.dim() ? weight.size(0) : 0, panels = ceil_div(features, kPanel), blocks = ceil_div(inputs, kBlockInputs);
  std::vector<int64_t> sizes{stored, kPanel, kBlockInputs};
  if (type == at::kFloat) sizes = {stored, kBlockInputs, kPanel};
  if (type == at::kBFloat16) sizes = {stored, kBlockInputs / 2, kPanel, 2};
  check_exact(weight, sizes, type, "the blocks of a weight");
  check_exact(places, stored, at::kInt, "the places of blocks");
  check_exact(ends, panels, at::kInt, "the ends of panels");
  const int32_t *place = places.const_data_ptr<int32_t>(), *end = ends.const_data_ptr<int32_t>();
  bool inside = true, ordered = (panels ? end[panels - 1] : 0) == stored;
  for (int64_t n = 0; n < stored; ++n) inside &= place[n] >= 0 && place[n] < blocks;
  for (int64_t panel = 0; panel < panels; ++panel) ordered &= end[panel] >= (panel ? end[panel - 1] : 0);
  TORCH_CHECK(ordered, "the ends of panels must not fall, and the last must be ", stored, ", the number of blocks");
  TORCH_CHECK(inside, "the places of blocks must be from 0 to ", blocks - 1);
  return {place, end};
}

template <typename T>
Tensor sparse_of(const Tensor& given, const Tensor& weight, const Tensor& places, const Tensor& ends, const Epilogue& epilogue) {
  check_linear(given, epilogue);
  int64_t inputs = given.size(-1);
  TORCH_CHECK(inputs % kBlockInputs == 0, "there are ", inputs, " inputs, and blocks take a multiple of ", kBlockInputs);
  StoredBlocks blocks = blocks_of(weight, places, ends, given.scalar_type(), inputs, epilogue.features);
  Tensor x = given.contiguous();
  const T *from = x.const_data_ptr<T>(), *stored = weight.const_data_ptr<T>();
  if constexpr (std::is_same_v<T, BFloat16>)
    if (by_amx(x, kFewestAmxBlockRows)) return linear_of<T>(x, TiledBlocks{from, stored, blocks, inputs}, epilogue);
  return with_operand<T>([&](auto zero) {
    if constexpr (std::is_same_v<T, decltype(zero)>) return linear_of<T>(x, SparsePlain<T>{from, stored, blocks, inputs}, epilogue);
    else return linear_of<T>(x, SparseWidened{from, stored, blocks, inputs}, epilogue);
  });
}

Tensor block_sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& places, const Tensor& ends, Optional bias,
                           Optional other, int64_t features, std::string_view activation, std::string_view combine) {
  Epilogue epilogue{bias, other, {}, {}, features, activation_of(activation), multiplies(combine)};
  return by_dtype(x, [&](auto zero) { return sparse_of<decltype(zero)>(x, weight, places, ends, epilogue); });
}

Tensor block_sparse_linear_norm(const Tensor& x, const Tensor& weight, const Tensor& places, const Tensor& ends, Optional bias,
                                Optional other, Optional norm_weight, Optional norm_bias, int64_t features, double eps) {
  Epilogue epilogue{bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps};
  return by_dtype(x, [&](auto zero) { return sparse_of<decltype(zero)>(x, weight, places, ends, epilogue); });
}

// The weight of a quantized layer, and how x is quantized.
struct QuantizedOperands {
  const Tensor &weight, &scale, &sums;
  Optional x_scale, x_zero_point, zero_point;
  std::string_view granularity;
  const Tensor *places = nullptr, *ends = nullptr;  // of the weight's blocks, where only those that are not zero are stored

  bool grouped() const { return scale.dim() == 3; }

  // Whether each row of x has a known scale, [..., 1], and zero point.
  bool by_row(const Tensor& x) const {
    auto fits = [&](const Tensor& known) {
      if (known.scalar_type() != at::kFloat || known.dim() != x.dim() || known.size(-1) != 1) return false;
      for (int64_t dim = 0; dim + 1 < x.dim(); ++dim)
        if (known.size(dim) != x.size(dim)) return false;
      return true;
    };
    return x_scale && fits(*x_scale) && (!x_zero_point || fits(*x_zero_point));
  }
};

// Raises unless the operands fit x.
void check_quantized(const Tensor& x, const QuantizedOperands& operands, const Epilogue& epilogue) {
  check_linear(x, epilogue);
  int64_t inputs = x.size(-1), columns = packed_features(epilogue), groups = operands.grouped() ? operands.scale.size(1) : 1;
  TORCH_CHECK(inputs <= kMostInt8Inputs, "there are ", inputs, " inputs, and int32 sums take at most ", kMostInt8Inputs);
  bool bytes = !operands.grouped() || operands.weight.scalar_type() == at::kChar;
  if (operands.places) {
    TORCH_CHECK(operands.granularity != "group" && operands.scale.dim() == 1,
                "a weight with zero blocks has one scale a feature, x one a row or in all");
  } else {
    check_exact(operands.weight, {columns / kPanel, ceil_div(inputs, 4), bytes ? kPanel : kPanel / 2, 4}, bytes ? at::kChar : at::kByte,
                "a packed weight");
  }
  if (operands.grouped()) {
    TORCH_CHECK(groups > 0 && inputs % groups == 0 && inputs / groups % 4 == 0, "scales have the sizes ", operands.scale.sizes(),
                ", and must be [panels, groups, 32], where each group has a multiple of four of the ", inputs, " inputs");
    check_exact(operands.scale, {columns / kPanel, groups, kPanel}, operands.scale.scalar_type() == at::kHalf ? at::kHalf : at::kFloat,
                "a weight's scale");
  } else {
    check_exact(operands.scale, columns, at::kFloat, "a weight's scale");
  }
  check_exact(operands.sums, columns, operands.grouped() ? at::kFloat : at::kInt, "the sums of a weight");
  check_granularity(x, operands.granularity);
  if (operands.granularity == "group") {
    TORCH_CHECK(!operands.x_scale, "x has a known scale, and granularity 'group' computes scales");
    TORCH_CHECK(inputs / groups % kGroup == 0, "a scale of the weight is of ", inputs / groups, " inputs, and must be of a multiple of ",
                kGroup, " where x has groups of ", kGroup);
  }
  bool by_row = operands.by_row(x);
  for (Optional known : {std::cref(operands.x_scale), std::cref(operands.x_zero_point)}) {
    check_readable(known, "the scale of x");
    TORCH_CHECK(!known || by_row || (known->numel() == 1 && !known->is_complex()),
                "x has one scale and one zero point where they are known, or both in float32 for each row");
  }
  TORCH_CHECK(!operands.x_zero_point || operands.x_scale, "x has a zero point only with a scale");
  if (operands.zero_point) {
    TORCH_CHECK(!bytes && operands.granularity == "group",
                "a weight has zero points only with four bits, where x has the granularity 'group'");
    check_exact(*operands.zero_point, {columns / kPanel, groups, kPanel}, at::kByte, "a weight's zero point");
  }
}

template <typename T, typename Source>
Tensor quantized_of(const Tensor& x, Source source, const QuantizedOperands& operands, const Epilogue& epilogue) {
  Tensor row_scales, row_zeros;  // keep the memory that the source reads
  if (operands.by_row(x)) {
    source.granularity = Granularity::kRows;
    row_scales = operands.x_scale->contiguous();
    source.row_scale = row_scales.const_data_ptr<float>();
    if (operands.x_zero_point) {
      row_zeros = operands.x_zero_point->contiguous();
      source.row_zero = row_zeros.const_data_ptr<float>();
    }
  } else if (operands.x_scale) {
    float scale = operands.x_scale->item<float>();
    TORCH_CHECK(std::isfinite(scale) && scale > 0, "the scale of x is ", scale, ", and must be finite and greater than 0");
    source.granularity = Granularity::kStatic;
    double zero = operands.x_zero_point ? operands.x_zero_point->item<double>() : 0;
    TORCH_CHECK(zero >= 0 && zero <= kLargestByte, "the zero point of x is ", zero, ", and must be from 0 to ", kLargestByte);
    source.quantization = {scale, 1.0f / scale, static_cast<int32_t>(zero)};
  }
  if (source.inputs > 0) source.measure();
  return linear_of<T>(x, source, epilogue);
}

template <typename T>
Tensor quantized_of(const Tensor& given, const QuantizedOperands& operands, const Epilogue& epilogue) {
  check_quantized(given, operands, epilogue);
  Tensor x = given.contiguous();
  int64_t inputs = x.size(-1), padded = ceil_div(inputs, 4) * 4, rows = x.numel() / std::max<int64_t>(inputs, 1);
  Granularity granularity = operands.granularity == "token" ? Granularity::kToken
                            : operands.granularity == "group" ? Granularity::kGroup : Granularity::kTensor;
  const T* from = x.const_data_ptr<T>();
  const int8_t* weight = static_cast<const int8_t*>(operands.weight.const_data_ptr());
  auto dense = [&](auto tiled) {
    return Quantized<T, decltype(tiled)::value>{from, weight, operands.scale.const_data_ptr<float>(), operands.sums.const_data_ptr<int32_t>(),
                                                rows, inputs, padded, granularity, Quantization{}};
  };
  if (operands.places) {
    StoredBlocks blocks = blocks_of(operands.weight, *operands.places, *operands.ends, at::kChar, inputs, epilogue.features);
    if constexpr (std::is_same_v<Element, uint8_t>)
      if (by_amx(x, kFewestAmxBlockRows)) return quantized_of<T>(x, TiledQuantizedBlocks<T>{dense(std::true_type{}), blocks}, operands, epilogue);
    return quantized_of<T>(x, SparseQuantized<T>{dense(std::false_type{}), blocks}, operands, epilogue);
  }
  auto grouped = [&](auto bits, auto by_group, auto shifts) {
    bool half = operands.scale.scalar_type() == at::kHalf;
    const float* weighted = operands.grouped() ? operands.sums.const_data_ptr<float>() : nullptr;
    constexpr int kBits = decltype(bits)::value;
    constexpr bool kByGroup = decltype(by_group)::value, kShifts = decltype(shifts)::value;
    GroupQuantized<T, kBits, kByGroup, kShifts> source{
        {from, weight, nullptr, nullptr, rows, inputs, padded, granularity, Quantization{}},
        operands.scale.const_data_ptr(), half, weighted, operands.grouped() ? operands.scale.size(1) : 1,
        operands.zero_point ? operands.zero_point->const_data_ptr<uint8_t>() : nullptr};
    if constexpr (kByGroup && std::is_same_v<Element, uint8_t>)
      if (by_amx(x, kFewestAmxGroupRows)) return quantized_of<T>(x, TiledGroups<T, kBits, kShifts>{source}, operands, epilogue);
    return quantized_of<T>(x, source, operands, epilogue);
  };
  auto of_bits = [&](auto bits) {
    constexpr std::false_type no;
    return granularity == Granularity::kGroup ? grouped(bits, std::true_type{}, no) : grouped(bits, no, no);
  };
  if (operands.zero_point) return grouped(std::integral_constant<int, 4>{}, std::true_type{}, std::true_type{});
  if (operands.weight.scalar_type() == at::kByte) return of_bits(std::integral_constant<int, 4>{});
  if (operands.grouped() || granularity == Granularity::kGroup) return of_bits(std::integral_constant<int, 8>{});
  if constexpr (std::is_same_v<Element, uint8_t>)
    if (by_amx(x)) return quantized_of<T>(x, dense(std::true_type{}), operands, epilogue);
  return quantized_of<T>(x, dense(std::false_type{}), operands, epilogue);
}

Tensor quantized(const Tensor& x, const QuantizedOperands& operands, const Epilogue& epilogue) {
  return by_dtype(x, [&](auto zero) { return quantized_of<decltype(zero)>(x, operands, epilogue); });
}

Tensor quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& sums, Optional x_scale,
                        Optional x_zero_point, Optional zero_point, Optional bias, Optional other, int64_t features,
                        std::string_view granularity, std::string_view activation, std::string_view combine) {
  return quantized(x, {weight, scale, sums, x_scale, x_zero_point, zero_point, granularity},
                 {bias, other, {}, {}, features, activation_of(activation), multiplies(combine)});
}

Tensor quantized_linear_norm(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& sums, Optional x_scale,
                             Optional x_zero_point, Optional zero_point, Optional bias, Optional other, Optional norm_weight,
                             Optional norm_bias, int64_t features, std::string_view granularity, double eps) {
  return quantized(x, {weight, scale, sums, x_scale, x_zero_point, zero_point, granularity},
                 {bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps});
}

Tensor block_sparse_quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& places, const Tensor& ends,
                                     const Tensor& scale, const Tensor& sums, Optional x_scale, Optional x_zero_point, Optional bias,
                                     Optional other, int64_t features, std::string_view granularity, std::string_view activation,
                                     std::string_view combine) {
  return quantized(x, {weight, scale, sums, x_scale, x_zero_point, {}, granularity, &places, &ends},
                 {bias, other, {}, {}, features, activation_of(activation), multiplies(combine)});
}

Tensor block_sparse_quantized_linear_norm(const Tensor& x, const Tensor& weight, const Tensor& places, const Tensor& ends,
                                          const Tensor& scale, const Tensor& sums, Optional x_scale, Optional x_zero_point,
                                          Optional bias, Optional other, Optional norm_weight, Optional norm_bias, int64_t features,
                                          std::string_view granularity, double eps) {
  return quantized(x, {weight, scale, sums, x_scale, x_zero_point, {}, granularity, &places, &ends},
                 {bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps});
}

Form form_of(std::string_view format) {
  if (format == "int8") return Form::kInt8;
  if (format == "uint8") return Form::kUint8;
  if (format == "fp8") return Form::kFp8;
  if (format == "int6") return Form::kInt6;
  if (format == "int5") return Form::kInt5;
  if (format == "uint5") return Form::kUint5;
  if (format == "int4") return Form::kInt4;
  if (format == "uint4") return Form::kUint4;
  if (format == "fp4") return Form::kFp4;
  TORCH_CHECK(false, "a weight is int8, uint8, fp8, int6, int5, uint5, int4, uint4 or fp4, not '", std::string(format), "'");
}

template <typename T>
Tensor weight_quantized_of(const Tensor& given, const QuantizedWeight& weight, const Epilogue& epilogue) {
  Tensor x = given.contiguous();
  TORCH_CHECK(weight.inputs % kPair<T> == 0, "there are ", weight.inputs, " inputs, and bfloat16 takes an even number");
  int64_t rows = x.numel() / std::max<int64_t>(weight.inputs, 1);
  if (TiledWeights<T>::fits(weight, rows) && by_amx(x, kFewestAmxWeightRows))
    return linear_of<T>(x, TiledWeights<T>{x.const_data_ptr<T>(), weight}, epilogue);
  if constexpr (std::is_same_v<T, BFloat16>)
    if (WeightQuantized<T, T> source{x.const_data_ptr<T>(), weight, rows}; by_amx(x) && !source.direct())
      return linear_of<T>(x, Tiled<WeightQuantized<T, T>>{source, weight.inputs}, epilogue);
  return with_operand<T>([&](auto zero) {
    return linear_of<T>(x, WeightQuantized<T, decltype(zero)>{x.const_data_ptr<T>(), weight, rows}, epilogue);
  });
}

ScaleKind kind_of(at::ScalarType dtype) {
  if (dtype == at::kHalf) return ScaleKind::kHalf;
  if (dtype == at::ScalarType::Float8_e8m0fnu) return ScaleKind::kPower;
  return dtype == at::ScalarType::Float8_e4m3fn ? ScaleKind::kFp8 : ScaleKind::kFloat;
}

Tensor weight_quantized(const Tensor& x, const Tensor& q, const Tensor& scale, Optional zero_point, std::string_view format,
                        double tensor_scale, const Epilogue& epilogue) {
  check_linear(x, epilogue);
  int64_t columns = packed_features(epilogue), inputs = x.size(-1);
  Form form = form_of(format);
  check_exact(q, {columns / kPanel, inputs, step_bytes(form)},
              form == Form::kInt8 ? at::kChar : form == Form::kFp8 ? at::ScalarType::Float8_e4m3fn : at::kByte, "a packed weight");
  TORCH_CHECK(scale.dim() == 3 && scale.size(1) > 0 && inputs % scale.size(1) == 0, "scales have the sizes ", scale.sizes(),
              ", and must be [panels, groups, 32], where the groups divide ", inputs, " inputs");
  int64_t groups = scale.size(1);
  std::initializer_list<int64_t> blocks{columns / kPanel, groups, kPanel};
  ScaleKind scales = kind_of(scale.scalar_type());
  check_exact(scale, blocks, scales == ScaleKind::kFloat ? at::kFloat : scale.scalar_type(), "a weight's scale");
  at::ScalarType kind = zero_point ? zero_point->scalar_type() : at::kByte;
  bool shifts = kind == at::kHalf || kind == at::kFloat;
  if (zero_point) check_exact(*zero_point, blocks, shifts ? kind : at::kByte, "a weight's zero point");
  const void* zeros = zero_point ? zero_point->const_data_ptr() : nullptr;
  float factor = static_cast<float>(tensor_scale) * (form == Form::kFp8 ? kFp8Factor : 1) * (scales == ScaleKind::kFp8 ? kFp8Factor : 1);
  TORCH_CHECK(std::isfinite(factor), "the scale of the tensor is ", tensor_scale, ", and must be finite in float32");
  QuantizedWeight packed{static_cast<const uint8_t*>(q.const_data_ptr()), form, scale.const_data_ptr(), scales,
                      factor, shifts ? nullptr : static_cast<const uint8_t*>(zeros), shifts ? zeros : nullptr, kind == at::kHalf, inputs,
                      groups};
  return by_dtype(x, [&](auto zero) { return weight_quantized_of<decltype(zero)>(x, packed, epilogue); });
}

Tensor weight_quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, Optional zero_point, Optional bias,
                               Optional other, int64_t features, std::string_view format, double tensor_scale,
                               std::string_view activation, std::string_view combine) {
  return weight_quantized(x, weight, scale, zero_point, format, tensor_scale,
                {bias, other, {}, {}, features, activation_of(activation), multiplies(combine)});
}

Tensor weight_quantized_linear_norm(const Tensor& x, const Tensor& weight, const Tensor& scale, Optional zero_point,
                                    Optional bias, Optional other, Optional norm_weight, Optional norm_bias, int64_t features,
                                    std::string_view format, double tensor_scale, double eps) {
  return weight_quantized(x, weight, scale, zero_point, format, tensor_scale,
                {bias, other, norm_weight, norm_bias, features, Activation::kNone, false, true, eps});
}

template <typename T, bool centers>
Tensor norm_of(const Tensor& given, Optional weight, Optional bias, double eps) {
  check_readable(given, "x");
  TORCH_CHECK(given.dim() >= 1, "x is a scalar, and must be [..., features]");
  int64_t n = given.size(-1);
  check_size(n, "the number of features");
  check_floats(weight, n, "a norm's weight"), check_floats(bias, n, "a norm's bias");
  Tensor x = given.contiguous(), y = allocate(x.sizes(), x.options());
  Converted<T> w(weight, x), b(bias, x);
  if (x.numel() > 0)
    run(RowNorm<T, centers>{w.pointer(), b.pointer(), n, static_cast<float>(eps)}, x.const_data_ptr<T>(), y.mutable_data_ptr<T>(),
        x.numel() / n);
  return y;
}

Tensor fused_layer_norm(const Tensor& x, Optional weight, Optional bias, double eps) {
  return by_dtype(x, [&](auto zero) { return norm_of<decltype(zero), true>(x, weight, bias, eps); });
}

Tensor fused_rms_norm(const Tensor& x, Optional weight, double eps) {
  return by_dtype(x, [&](auto zero) { return norm_of<decltype(zero), false>(x, weight, {}, eps); });
}

template <typename T>
Tensor rotary_of(const Tensor& given, const Tensor& cos, const Tensor& sin, bool interleaved) {
  check_readable(given, "x"), check_readable(cos, "cos"), check_readable(sin, "sin");
  check_dtype(cos, given.scalar_type(), "cos"), check_dtype(sin, given.scalar_type(), "sin");
  TORCH_CHECK(given.dim() == 4 && cos.dim() >= 1 && sin.dim() >= 1, "x has ", given.dim(),
              " dimensions, and must be [batch, heads, tokens, head_dim], to which cos and sin broadcast");
  for (int64_t size : given.sizes()) check_size(size, "a size of x");
  Tensor x = given.stride(3) == 1 ? given : given.contiguous();
  int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3), angles = cos.size(-1);
  check_size(angles, "the number of angles");
  TORCH_CHECK(head_dim % 2 == 0 && (angles == head_dim || 2 * angles == head_dim) && sin.size(-1) == angles, "cos and sin have ",
              angles, " and ", sin.size(-1), " angles, and must have one for each of an even number of features, here ", head_dim,
              ", or one a pair");
  auto spread = [&](const Tensor& table) {
    Tensor rows = table.stride(-1) == 1 ? table : table.contiguous();
    return rows.expand({batch, heads, tokens, angles});
  };
  Tensor c = spread(cos), s = spread(sin);
  Tensor y = allocate({batch, tokens, heads, head_dim}, x.options()).transpose(1, 2);
  if (y.numel() > 0)
    run(Rotary<T>{x.const_data_ptr<T>(), c.const_data_ptr<T>(), s.const_data_ptr<T>(), y.mutable_data_ptr<T>(), strides_of(x),
                  strides_of(c), strides_of(s), strides_of(y), batch, heads, tokens, head_dim, angles, interleaved});
  return y;
}

Tensor fused_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return by_dtype(x, [&](auto zero) { return rotary_of<decltype(zero)>(x, cos, sin, interleaved); });
}

// Rows of a packed weight, gathered from elements `stride` bytes apart.
Tensor packed_embedding(const Tensor& weight, const Tensor& indices, int64_t features, int64_t bits) {
  check_readable(weight, "a packed weight");
  Tensor rows = checked_indices(indices);
  bool halves = bits == 4;
  int64_t width_of_panel = halves ? kPanel / 2 : kPanel;
  TORCH_CHECK(weight.is_contiguous() && weight.dim() >= 3 && weight.dim() <= 4 && weight.size(2) == width_of_panel,
              "a packed weight has the sizes ", weight.sizes(), ", and must be contiguous and [panels, steps, ", width_of_panel,
              "] or [panels, steps, 32, values of a step]");
  int64_t steps = weight.size(1), pair = weight.dim() == 4 ? weight.size(3) : 1;
  TORCH_CHECK(halves ? weight.scalar_type() == at::kByte && steps * pair % 2 == 0 : bits == 8 || bits == 16 || bits == 32,
              "a number takes ", bits, " bits, and must take 8, 16, 32, or 4 in bytes of an even number of inputs");
  check_size(features, "the number of features");
  TORCH_CHECK(ceil_div(features, kPanel) == weight.size(0), "a packed weight has ", weight.size(0), " panels of ", kPanel,
              " rows, and must have those of ", features, " features");
  int64_t width = pair * weight.element_size(), stride = weight.size(2) * width;
  std::vector<int64_t> sizes = indices.sizes().vec();
  sizes.push_back(halves ? steps * pair / 2 : steps * pair);
  Tensor found = at::empty(sizes, weight.options());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(found.mutable_data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < features, "index out of range in packed_embedding, which has rows 0 to ",
                      features - 1);
    const char* place = from + row[i] / kPanel * steps * stride;
    int64_t column = row[i] % kPanel;
    if (halves) {
      int shift = column < kPanel / 2 ? 0 : 4;
      place += column % (kPanel / 2) * pair;
      auto bits_of = [&](int64_t input) { return (place[input / pair * stride + input % pair] >> shift) & 15; };
      for (int64_t input = 0; input < steps * pair; input += 2) *to++ = bits_of(input) | (bits_of(input + 1) << 4);
    } else {
      place += column * width;
      for (int64_t step = 0; step < steps; ++step, place += stride, to += width) std::memcpy(to, place, width);
    }
  }
  return found;
}

// The name of the instruction set that this library was built for.
std::string instruction_set() {
#if defined(LISSOM_ISA)
  return LISSOM_ISA;
#else
  return "unknown";
#endif
}

// Whether products of many rows go by tiles; with `wanted` this is set, where the operating system permits or they are emulated.
bool use_amx(std::optional<bool> wanted) {
  if (wanted) amx = *wanted && (!kHasAmx || amx_permitted());
  return amx;
}

// Whether bfloat16 is multiplied by the processor's own instruction; with `wanted` this is set, where it has that instruction.
bool dots_bfloat16(std::optional<bool> wanted) {
  if (wanted) dots = kHasDot && *wanted;
  return dots;
}

bool has_int8() { return kHasInt8; }
bool has_weight_quantized() { return kHasWeightQuantized; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lissom, CPU, library) {
  implement<packed_linear>(library, "packed_linear");
  implement<packed_linear_norm>(library, "packed_linear_norm");
  implement<packed_embedding>(library, "packed_embedding");
  implement<block_sparse_linear>(library, "block_sparse_linear");
  implement<block_sparse_linear_norm>(library, "block_sparse_linear_norm");
  if (kHasInt8) {
    implement<quantized_linear>(library, "quantized_linear");
    implement<quantized_linear_norm>(library, "quantized_linear_norm");
    implement<block_sparse_quantized_linear>(library, "block_sparse_quantized_linear");
    implement<block_sparse_quantized_linear_norm>(library, "block_sparse_quantized_linear_norm");
  }
  if (kHasWeightQuantized) {
    implement<weight_quantized_linear>(library, "weight_quantized_linear");
    implement<weight_quantized_linear_norm>(library, "weight_quantized_linear_norm");
  }
  implement<fused_attention>(library, "fused_attention");
  implement<merged_attention>(library, "merged_attention");
  implement<unpadded_attention>(library, "unpadded_attention");
  implement<block_sparse_attention>(library, "block_sparse_attention");
  implement<fused_layer_norm>(library, "fused_layer_norm");
  implement<fused_rms_norm>(library, "fused_rms_norm");
  implement<fused_rotary>(library, "fused_rotary");
  library.impl("gated_delta_rule", boxed<gated_delta_rule>);
  library.impl("selective_scan", boxed<selective_scan>);
  library.impl("fake_quantize", boxed<fake_quantize_static>);
  library.impl("fake_quantize_dynamic", boxed<fake_quantize_dynamic>);
  library.impl("fake_quantize_backward", boxed<fake_quantize_gradients>);
  library.impl("quantize_weight", boxed<quantize_weight>);
  library.impl("best_scales", boxed<best_scales>);
  library.impl("token_divergence", boxed<token_divergence>);
  library.impl("run_chain", boxed<run_chain>);
  add_kernel<reshape>("aten::reshape"), add_kernel<reshape>("aten::view");
  add_kernel<transpose>("aten::transpose.int"), add_kernel<permute>("aten::permute");
  add_kernel<unsqueeze>("aten::unsqueeze"), add_kernel<expand>("aten::expand");
  add_kernel<lissom::select>("aten::select.int"), add_kernel<slice>("aten::slice.Tensor");
  add_kernel<split>("aten::split_with_sizes"), add_kernel<split_evenly>("aten::split.Tensor");
  add_kernel<chunk>("aten::chunk"), add_kernel<unbind>("aten::unbind.int"), add_kernel<lissom::add>("aten::add.Tensor");
  add_kernel<index_copy_>("aten::index_copy_"), add_kernel<index_select>("aten::index_select");
  add_kernel<embedding>("aten::embedding");
  add_kernel<lissom::layer_norm>("aten::layer_norm");
}

STABLE_TORCH_LIBRARY_FRAGMENT(lissom, library) {
  library.def("instruction_set() -> str");
  library.def("use_amx(bool? wanted=None) -> bool");
  library.def("dots_bfloat16(bool? wanted=None) -> bool");
  library.def("has_int8() -> bool");
  library.def("has_weight_quantized() -> bool");
  library.def("begin_call() -> ()");
  library.def("end_call() -> ()");
  library.def("chain_operators() -> str[]");
  library.def(
      "make_chain(str[] operators, int[] code, float[] floats, str[] texts, Tensor[] constants, int inputs, int numbers, "
      "int registers, int[] outputs) -> Tensor");
  library.def("run_chain(Tensor chain, Tensor[] inputs, int[] numbers) -> Tensor[]");
  library.def("barrier(Tensor steps, int rank, int step, float seconds) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lissom, CompositeImplicitAutograd, library) {
  library.impl("instruction_set", boxed<instruction_set>);
  library.impl("use_amx", boxed<use_amx>);
  library.impl("dots_bfloat16", boxed<dots_bfloat16>);
  library.impl("has_int8", boxed<has_int8>);
  library.impl("has_weight_quantized", boxed<has_weight_quantized>);
  library.impl("begin_call", boxed<begin_call>);
  library.impl("end_call", boxed<end_call>);
  library.impl("chain_operators", boxed<chain_operators>);
  library.impl("make_chain", boxed<make_chain>);
  library.impl("barrier", boxed<barrier>);
}

}  // namespace lissom
