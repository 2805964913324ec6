// The entry points of quantization followed by dequantization: they check and convert the operands.
#pragma once

#include "checks.h"
#include "fake_quantize.h"

#include <string>
#include <tuple>

namespace lissom {
namespace {

inline Grid grid_of(std::string_view format) {
  if (format == "int8") return {-128, 127};
  if (format == "uint8") return {0, 255, true, false};
  if (format == "int4") return {-8, 7};
  if (format == "uint4") return {0, 15, true, false};
  if (format == "fp8") return {-448, 448, false};
  if (format == "fp4") return {-kLargestFp4, kLargestFp4, false};
  TORCH_CHECK(false, "the format is int8, uint8, int4, uint4, fp8 or fp4, not '", std::string(format), "'");
}

// Calls work with the dtype the kernel reads, x in it, and whether q is an integer: bfloat16 as it is, all else as float32.
template <typename Work>
inline auto with_values(const Tensor& x, const Grid& grid, Work&& work) {
  check_readable(x, "x");
  TORCH_CHECK(x.is_floating_point(), "x is of ", x.scalar_type(), ", and must be of a floating dtype");
  auto typed = [&](auto zero) {
    Tensor values = x.to(c10::CppTypeToScalarType<decltype(zero)>::value).contiguous();
    return grid.is_integer ? work(zero, values, std::true_type{}) : work(zero, values, std::false_type{});
  };
  return x.scalar_type() == at::kBFloat16 ? typed(BFloat16{}) : typed(float{});
}

// The scales and zero points of x in float32, and the blocks they belong to.
struct Scales {
  Tensor scale, zero_point;
  Blocks blocks;

  Scales(const Tensor& x, const Tensor& given, Optional zero, double tensor_scale = 1) {
    scale = converted(given, given.sizes(), "a scale");
    if (zero) zero_point = converted(*zero, given.sizes(), "a zero point");
    int64_t columns = x.dim() ? x.size(-1) : 1, dims = x.dim();
    blocks = {scale.const_data_ptr<float>(), zero ? zero_point.const_data_ptr<float>() : nullptr,
              x.numel() / std::max<int64_t>(columns, 1), columns, 1};
    blocks.tensor_scale = static_cast<float>(tensor_scale);
    bool shared = scale.numel() == 1, fits = shared || scale.dim() == dims;
    for (int64_t dim = 0; dim < dims && fits; ++dim) {
      int64_t parts = shared ? 1 : scale.size(dim);
      fits = parts > 0 ? x.size(dim) % parts == 0 : x.size(dim) == 0;
      if (dim == dims - 1) blocks.groups = parts;
      else if (parts > 0) blocks.sizes.push_back(x.size(dim)), blocks.heights.push_back(x.size(dim) / parts);
    }
    TORCH_CHECK(fits, "a scale has the sizes ", given.sizes(), ", and must have one number, or sizes that divide those of x, ",
                x.sizes());
  }

  static Tensor converted(const Tensor& given, at::IntArrayRef sizes, const char* name) {
    check_readable(given, name);
    TORCH_CHECK(!given.is_complex(), name, " is complex, and must be real");
    return given.to(at::kFloat).expand(sizes).contiguous();
  }

  // The sums over each block of numbers [rows, groups], in the sizes of the scale.
  Tensor summed(const Tensor& changes) const {
    std::vector<int64_t> parts, heights;
    for (size_t dim = 0; dim < blocks.sizes.size(); ++dim) {
      heights.push_back(parts.size() + 1);
      parts.insert(parts.end(), {blocks.sizes[dim] / blocks.heights[dim], blocks.heights[dim]});
    }
    bool one_row_each = changes.numel() == scale.numel();
    parts.push_back(blocks.groups);
    return one_row_each ? changes.view(scale.sizes()) : changes.view(parts).sum(heights).view(scale.sizes());
  }
};

Tensor fake_quantize_static(const Tensor& x, const Tensor& scale, Optional zero_point, std::string_view format,
                            double tensor_scale) {
  Grid grid = grid_of(format);
  return with_values(x, grid, [&](auto zero, const Tensor& values, auto is_integer) {
    using T = decltype(zero);
    Scales scales(values, scale, zero_point, tensor_scale);
    Tensor y = at::empty_like(values);
    if (y.numel() > 0)
      fake_quantize<is_integer.value>(scales.blocks, grid, values.const_data_ptr<T>(), y.template mutable_data_ptr<T>());
    return y.to(x.scalar_type());
  });
}

void check_granularity(const Tensor& x, std::string_view granularity) {
  TORCH_CHECK(granularity == "token" || granularity == "tensor" || granularity == "group",
              "granularity is 'token', 'tensor' or 'group', not '", std::string(granularity), "'");
  TORCH_CHECK(granularity != "group" || (x.dim() > 0 && x.size(-1) % kGroup == 0), "x has the sizes ", x.sizes(),
              ", and groups need a multiple of ", kGroup, " features");
}

Tensor fake_quantize_dynamic(const Tensor& x, std::string_view format, std::string_view granularity) {
  Grid grid = grid_of(format);
  check_granularity(x, granularity);
  return with_values(x, grid, [&](auto zero, const Tensor& values, auto is_integer) {
    using T = decltype(zero);
    Tensor y = at::empty_like(values);
    if (y.numel() == 0) return y.to(x.scalar_type());
    const T* from = values.const_data_ptr<T>();
    T* to = y.template mutable_data_ptr<T>();
    int64_t columns = x.dim() ? x.size(-1) : 1, rows = x.numel() / columns;
    if (granularity != "tensor") {
      int64_t width = granularity == "group" ? kGroup : columns;
      fake_quantize_rows<is_integer.value>(grid, x.numel() / width, width, from, to);
      return y.to(x.scalar_type());
    }
    auto [low, high] = Tensor::call<2>("aten::aminmax", "", values, std::optional<int64_t>(), false);
    auto [scale, zero_point] = scale_for(low.template item<float>(), high.template item<float>(), grid);
    fake_quantize<is_integer.value>({&scale, &zero_point, rows, columns, 1}, grid, from, to);
    return y.to(x.scalar_type());
  });
}

Tensor quantize_weight(const Tensor& weight, const Tensor& scale, Optional zero_point, std::string_view format) {
  Grid grid = grid_of(format);
  bool halves = format == "int4" || format == "uint4";
  TORCH_CHECK(grid.is_integer, "the format is an integer one, not '", std::string(format), "'");
  TORCH_CHECK(weight.dim() > 0 && (!halves || weight.size(-1) % 2 == 0), "a weight has the sizes ", weight.sizes(),
              ", and two elements of four bits share a byte");
  return with_values(weight, grid, [&](auto zero, const Tensor& values, auto) {
    using T = decltype(zero);
    Scales scales(values, scale, zero_point);
    std::vector<int64_t> sizes(values.sizes().begin(), values.sizes().end());
    if (halves) sizes.back() /= 2;
    Tensor q = at::empty(sizes, scales.scale.options().dtype(grid.low < 0 && !halves ? at::kChar : at::kByte));
    if (q.numel() > 0)
      quantize(scales.blocks, grid, halves, values.const_data_ptr<T>(), static_cast<uint8_t*>(q.mutable_data_ptr()));
    return q;
  });
}

std::tuple<Tensor, Tensor> best_scales(const Tensor& blocks, const Tensor& factors, std::string_view format) {
  Grid grid = grid_of(format);
  TORCH_CHECK(grid.is_integer, "the format is an integer one, not '", std::string(format), "'");
  check_readable(factors, "factors");
  TORCH_CHECK(blocks.dim() == 2, "blocks have the sizes ", blocks.sizes(), ", and must be [blocks, elements of each]");
  TORCH_CHECK(factors.dim() == 1 && factors.size(0) > 0 && factors.scalar_type() == at::kFloat, "factors must be [count] in float32");
  return with_values(blocks, grid, [&](auto zero, const Tensor& values, auto) {
    using T = decltype(zero);
    Tensor given = factors.contiguous(), scale = at::empty({values.size(0)}, given.options()), offset = at::empty_like(scale);
    std::vector<float> each(given.const_data_ptr<float>(), given.const_data_ptr<float>() + given.numel());
    search_scales(grid, format == "int4", values.size(0), values.size(1), values.const_data_ptr<T>(), each,
                  scale.mutable_data_ptr<float>(), offset.mutable_data_ptr<float>());
    return std::make_tuple(scale, offset);
  });
}

std::tuple<Tensor, Tensor> fake_quantize_gradients(const Tensor& gradient, const Tensor& x, const Tensor& scale,
                                                   Optional zero_point, std::string_view format, bool scales_learn,
                                                   double tensor_scale) {
  Grid grid = grid_of(format);
  check_readable(gradient, "a gradient");
  TORCH_CHECK(gradient.sizes() == x.sizes(), "a gradient has the sizes ", gradient.sizes(), ", and must have ", x.sizes());
  return with_values(x, grid, [&](auto zero, const Tensor& values, auto is_integer) {
    using T = decltype(zero);
    Scales scales(values, scale, zero_point, tensor_scale);
    Tensor given = gradient.to(values.scalar_type()).contiguous(), found = at::empty_like(values);
    Tensor changes = at::zeros({scales_learn ? scales.blocks.rows : 0, scales.blocks.groups}, scales.scale.options());
    if (found.numel() > 0)
      fake_quantize_backward<is_integer.value>(scales.blocks, grid, given.const_data_ptr<T>(), values.const_data_ptr<T>(),
                                               found.template mutable_data_ptr<T>(),
                                               scales_learn ? changes.mutable_data_ptr<float>() : nullptr);
    return std::make_tuple(found.to(x.scalar_type()), scales_learn ? scales.summed(changes) : at::zeros({0}, changes.options()));
  });
}

}  // namespace
}  // namespace lissom
