// The part of ATen that the kernels use, on PyTorch's stable C interface: one library runs with PyTorch 2.11 and later versions.
// The names are ATen's. Views take no detour through the dispatcher, and gradients are registered in Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace lissom {
namespace at {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

constexpr auto kBool = ScalarType::Bool, kByte = ScalarType::Byte, kChar = ScalarType::Char, kInt = ScalarType::Int,
               kLong = ScalarType::Long, kHalf = ScalarType::Half, kBFloat16 = ScalarType::BFloat16, kFloat = ScalarType::Float,
               kDouble = ScalarType::Double;

inline int64_t get_num_threads() { return torch::stable::get_num_threads(); }

struct IntArrayRef : torch::headeronly::IntHeaderOnlyArrayRef {
  using Base = torch::headeronly::IntHeaderOnlyArrayRef;
  using Base::Base;
  IntArrayRef(const Base& base) : Base(base) {}
  IntArrayRef(const int64_t& one) : Base(&one, 1) {}
  bool operator==(const IntArrayRef& other) const { return equals(other); }
  std::vector<int64_t> vec() const { return {begin(), end()}; }
};

inline std::ostream& operator<<(std::ostream& stream, const IntArrayRef& sizes) {
  stream << "[";
  for (size_t n = 0; n < sizes.size(); ++n) stream << (n ? ", " : "") << sizes[n];
  return stream << "]";
}

inline size_t bytes_of(ScalarType type) {
  switch (type) {
#define LISSOM_BYTES(T, name) \
  case ScalarType::name: return sizeof(T);
    AT_FORALL_SCALAR_TYPES_WITH_COMPLEX_AND_QINTS(LISSOM_BYTES)
#undef LISSOM_BYTES
    default: throw std::runtime_error("a tensor of an unknown dtype");
  }
}

// The dtype of a new tensor.
struct TensorOptions {
  ScalarType type;
  TensorOptions dtype(ScalarType other) const { return {other}; }
};

}  // namespace at

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Python raises RuntimeError and IndexError.
#define TORCH_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::lissom::joined(__VA_ARGS__))
#define TORCH_CHECK_INDEX(condition, ...) \
  if (!(condition)) throw std::out_of_range(::lissom::joined(__VA_ARGS__))

// The bytes of a dense tensor. Raises when they do not fit in 63 bits.
inline size_t contiguous_bytes(at::IntArrayRef sizes, size_t item) {
  int64_t found = item;
  for (int64_t size : sizes)
    TORCH_CHECK(size >= 0 && !__builtin_mul_overflow(found, size, &found), "a tensor of the sizes ", sizes, " is too large");
  return found;
}

inline std::vector<int64_t> contiguous_strides(at::IntArrayRef sizes) {
  std::vector<int64_t> found(sizes.size(), 1);
  for (size_t n = sizes.size(); n-- > 1;) found[n - 1] = found[n] * std::max<int64_t>(sizes[n], 1);
  return found;
}

class Tensor : public torch::stable::Tensor {
  using Base = torch::stable::Tensor;

 public:
  Tensor() = default;  // undefined
  Tensor(Base base) : Base(std::move(base)) {}

  at::IntArrayRef sizes() const { return Base::sizes(); }
  at::IntArrayRef strides() const { return Base::strides(); }
  at::TensorOptions options() const { return {scalar_type()}; }

  size_t storage_bytes() const {
    int64_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(get(), &found));
    return found;
  }
  bool is_strided() const {
    int32_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(get(), &found));
    return found == aoti_torch_layout_strided();
  }
  bool is_complex() const {
    auto type = scalar_type();
    return type == at::ScalarType::ComplexHalf || type == at::ScalarType::ComplexFloat || type == at::ScalarType::ComplexDouble;
  }
  bool is_floating_point() const {
    switch (scalar_type()) {
      case at::kHalf: case at::kBFloat16: case at::kFloat: case at::kDouble:
      case at::ScalarType::Float8_e4m3fn: case at::ScalarType::Float8_e5m2: return true;
      default: return false;
    }
  }

  Tensor to(at::ScalarType type) const { return type == scalar_type() ? *this : Tensor(torch::stable::to(*this, type)); }
  Tensor contiguous() const { return is_contiguous() ? *this : Tensor(torch::stable::contiguous(*this)); }
  Tensor clone() const { return torch::stable::clone(*this); }
  Tensor sum(at::IntArrayRef dims) const { return torch::stable::sum(*this, dims); }
  Tensor exp() const { return call<1>("aten::exp", "", *this)[0]; }
  Tensor mul(const Tensor& other) const { return call<1>("aten::mul", "Tensor", *this, other)[0]; }

  template <typename T>
  T item() const {
    return static_cast<T>(*to(at::kDouble).template const_data_ptr<double>());
  }

  // A view; `offset` counts from the first element of this one.
  Tensor strided(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset = 0) const {
    AtenTensorHandle found;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(get(), sizes.size(), sizes.data(), strides.data(), offset, &found));
    return Tensor(Base(found));
  }
  Tensor view(at::IntArrayRef sizes) const {
    TORCH_CHECK(is_contiguous(), "only contiguous tensors are viewed in other sizes");
    return strided(sizes, contiguous_strides(sizes));
  }
  Tensor transpose(int64_t one, int64_t other) const {
    auto sizes = this->sizes().vec(), strides = this->strides().vec();
    std::swap(sizes[one], sizes[other]), std::swap(strides[one], strides[other]);
    return strided(sizes, strides);
  }
  // Raises unless the sizes broadcast to the ones that are wanted.
  Tensor expand(at::IntArrayRef wanted) const {
    TORCH_CHECK(broadcasts(wanted), "the sizes ", sizes(), " do not broadcast to ", wanted);
    std::vector<int64_t> strides(wanted.size(), 0);
    int64_t missing = static_cast<int64_t>(wanted.size()) - dim();
    for (int64_t n = 0; n < dim(); ++n)
      if (size(n) == wanted[missing + n]) strides[missing + n] = stride(n);
    return strided(wanted, strides);
  }
  bool broadcasts(at::IntArrayRef wanted) const {
    int64_t missing = static_cast<int64_t>(wanted.size()) - dim();
    if (missing < 0) return false;
    for (int64_t n = 0; n < dim(); ++n)
      if (size(n) != 1 && size(n) != wanted[missing + n]) return false;
    return true;
  }

  // Calls an operator through the dispatcher; returns its outputs.
  template <size_t outputs, typename... Arguments>
  static std::array<Tensor, outputs> call(const char* name, const char* overload, const Arguments&... arguments) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, std::max(outputs, sizeof...(Arguments))> stack{passed(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    std::array<Tensor, outputs> found;
    for (size_t n = 0; n < outputs; ++n) found[n] = Tensor(to<Base>(stack[n]));
    return found;
  }

 private:
  static StableIValue passed(const Tensor& tensor) { return torch::stable::detail::from(static_cast<const Base&>(tensor)); }
  template <typename T>
  static StableIValue passed(const T& value) {
    return torch::stable::detail::from(value);
  }
};

using Optional = const std::optional<Tensor>&;

// Memory aligned to a cache line, so that no vector load crosses one; freed with std::free.
inline void* aligned_memory(size_t bytes) {
  void* found = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!found && bytes) throw std::bad_alloc();
  return found;
}

namespace at {

inline Tensor empty(IntArrayRef sizes, TensorOptions options) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(options.type));
  auto strides = contiguous_strides(sizes);
  AtenTensorHandle found;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &found));
  return Tensor(torch::stable::Tensor(found));
}

inline Tensor empty_like(const Tensor& tensor) { return empty(tensor.sizes(), tensor.options()); }

inline Tensor zeros(IntArrayRef sizes, TensorOptions options) {
  Tensor found = empty(sizes, options);
  std::memset(found.mutable_data_ptr(), 0, found.numel() * found.element_size());
  return found;
}

}  // namespace at

// Converts a function of tensors, numbers and texts to one that PyTorch's dispatcher calls.
template <typename T>
struct Taken {
  static T from(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Taken<Tensor> {
  static Tensor from(StableIValue value) { return torch::stable::detail::to<torch::stable::Tensor>(value); }
};
template <>
struct Taken<std::optional<Tensor>> {
  static std::optional<Tensor> from(StableIValue value) {
    auto found = torch::stable::detail::to<std::optional<torch::stable::Tensor>>(value);
    return found ? std::optional<Tensor>(std::move(*found)) : std::nullopt;
  }
};
template <>
struct Taken<at::IntArrayRef> {
  static std::vector<int64_t> from(StableIValue value) { return torch::stable::detail::to<std::vector<int64_t>>(value); }
};
template <>
struct Taken<std::string_view> {
  // PyTorch's own conversion to std::string never frees a copy.
  static std::string from(StableIValue value) {
    auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* data;
    size_t length;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    std::string found(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return found;
  }
};

inline StableIValue given(const Tensor& tensor) {
  return torch::stable::detail::from(static_cast<const torch::stable::Tensor&>(tensor));
}
inline StableIValue given(bool value) { return torch::stable::detail::from(value); }
inline StableIValue given(const std::string& value) { return torch::stable::detail::from(value); }

template <typename Result, typename... Arguments>
void call_boxed(Result (*function)(Arguments...), StableIValue* stack) {
  [&]<size_t... n>(std::index_sequence<n...>) {
    std::tuple<decltype(Taken<std::remove_cvref_t<Arguments>>::from(0))...> taken{
        Taken<std::remove_cvref_t<Arguments>>::from(stack[n])...};
    if constexpr (std::is_void_v<Result>) std::apply(function, taken);
    else if constexpr (requires { std::tuple_size<Result>::value; }) {
      auto found = std::apply(function, taken);
      stack[0] = given(std::get<0>(found)), stack[1] = given(std::get<1>(found));
    } else {
      stack[0] = given(std::apply(function, taken));
    }
  }(std::index_sequence_for<Arguments...>{});
}

template <auto function>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  call_boxed(function, stack);
}

}  // namespace lissom
