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

// Sizes or strides: up to six without an allocation.
class Dimensions {
 public:
  Dimensions() = default;
  Dimensions(at::IntArrayRef from) : count_(from.size()) {
    if (count_ > kFew) many_ = std::make_shared<const std::vector<int64_t>>(from.begin(), from.end());
    else std::copy(from.begin(), from.end(), few_.begin());
  }
  size_t size() const { return count_; }
  const int64_t* data() const { return many_ ? many_->data() : few_.data(); }
  int64_t operator[](size_t dim) const { return data()[dim]; }
  operator at::IntArrayRef() const { return {data(), count_}; }

 private:
  static constexpr size_t kFew = 6;
  size_t count_ = 0;
  std::array<int64_t, kFew> few_;
  std::shared_ptr<const std::vector<int64_t>> many_;
};

// A dimension counted from the front.
inline int64_t wrapped(int64_t dim, int64_t dims) {
  TORCH_CHECK_INDEX(dim >= -dims && dim < dims, "a dimension is ", dim, ", and there are ", dims);
  return dim < 0 ? dim + dims : dim;
}

// The memory of a tensor: PyTorch's, or a block of one's own that `release` frees.
struct Memory {
  torch::stable::Tensor* lent = nullptr;
  char* base = nullptr;
  size_t bytes = 0;
  void (*release)(void* block, size_t bytes) = nullptr;

  ~Memory() {
    if (release) release(base, bytes);
    delete lent;
  }
};

// A tensor whose sizes are read from PyTorch once, and whose views and intermediate results are no objects of PyTorch.
class Tensor {
  using Base = torch::stable::Tensor;

 public:
  Tensor() = default;  // undefined
  Tensor(Base base) {
    if (!base.defined()) return;
    memory_ = std::make_shared<Memory>();
    memory_->lent = new Base(std::move(base));
    const Base& lent = *memory_->lent;
    type_ = lent.scalar_type(), cpu_ = lent.is_cpu(), strided_ = layout_of(lent) == aoti_torch_layout_strided();
    if (!strided_) return;
    sizes_ = at::IntArrayRef(lent.sizes()), strides_ = at::IntArrayRef(lent.strides());
    data_ = static_cast<char*>(const_cast<void*>(lent.const_data_ptr()));
    if (data_) memory_->base = data_ - lent.storage_offset() * element_size();
    memory_->bytes = storage_size_of(lent);
    TORCH_CHECK(memory_->base || numel() == 0, "a tensor has no memory; it may be fake, or its storage was freed");
  }
  // A block of one's own, which becomes that of the tensor.
  Tensor(void* block, size_t bytes, void (*release)(void*, size_t), at::IntArrayRef sizes, at::ScalarType type)
      : memory_(std::make_shared<Memory>()), data_(static_cast<char*>(block)), sizes_(sizes), strides_(contiguous_strides(sizes)),
        type_(type) {
    memory_->base = data_, memory_->bytes = bytes, memory_->release = release;
  }

  // PyTorch's tensor of the same elements.
  Base stable() const {
    if (!memory_) return Base();
    if (const Base* lent = memory_->lent) {
      if (whole_) return *lent;
      AtenTensorHandle found;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(lent->get(), dim(), sizes_.data(), strides_.data(),
                                                                   storage_offset() - lent->storage_offset(), &found));
      return Base(found);
    }
    torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(memory_->base, sizes(), strides(), cpu, type_, [held = memory_](void*) {}, storage_offset());
  }

  bool defined() const { return static_cast<bool>(memory_); }
  bool is_cpu() const { return cpu_; }
  bool is_strided() const { return strided_; }
  at::ScalarType scalar_type() const { return type_; }
  at::TensorOptions options() const { return {type_}; }
  size_t element_size() const { return at::bytes_of(type_); }
  int64_t dim() const { return sizes_.size(); }
  at::IntArrayRef sizes() const { return sizes_; }
  at::IntArrayRef strides() const { return strides_; }
  int64_t size(int64_t dim) const { return sizes_[wrapped(dim, this->dim())]; }
  int64_t stride(int64_t dim) const { return strides_[wrapped(dim, this->dim())]; }
  int64_t numel() const {
    int64_t found = 1;
    bool large = false, none = false;
    for (int64_t n = 0; n < dim(); ++n) none |= sizes_[n] == 0, large |= __builtin_mul_overflow(found, sizes_[n], &found);
    TORCH_CHECK(!large || none, "a tensor of the sizes ", sizes(), " is too large");
    return none ? 0 : found;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    bool found = true;
    for (int64_t n = dim(); n-- > 0; step *= sizes_[n]) {
      if (sizes_[n] == 0) return true;
      found &= sizes_[n] == 1 || strides_[n] == step;
    }
    return found;
  }
  // In elements.
  int64_t storage_offset() const { return (data_ - memory_->base) / static_cast<int64_t>(element_size()); }
  size_t storage_bytes() const { return memory_->bytes; }
  // False where PyTorch has moved or resized the memory since.
  bool is_current() const {
    const Base* lent = memory_->lent;
    return !lent || (lent->const_data_ptr() == data_ && storage_size_of(*lent) == memory_->bytes);
  }

  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const {
    Base* lent = memory_->lent;  // may share its memory until it is written
    if (!lent) return data_;
    int64_t place = data_ - static_cast<const char*>(lent->const_data_ptr());
    return static_cast<char*>(lent->mutable_data_ptr()) + place;
  }
  template <typename T>
  const T* const_data_ptr() const {
    check_type<T>();
    return reinterpret_cast<const T*>(data_);
  }
  template <typename T>
  T* mutable_data_ptr() const {
    check_type<T>();
    return static_cast<T*>(mutable_data_ptr());
  }
  bool is_complex() const {
    return type_ == at::ScalarType::ComplexHalf || type_ == at::ScalarType::ComplexFloat || type_ == at::ScalarType::ComplexDouble;
  }
  bool is_floating_point() const {
    switch (type_) {
      case at::kHalf: case at::kBFloat16: case at::kFloat: case at::kDouble:
      case at::ScalarType::Float8_e4m3fn: case at::ScalarType::Float8_e5m2: return true;
      default: return false;
    }
  }

  Tensor to(at::ScalarType type) const { return type == type_ ? *this : Tensor(torch::stable::to(stable(), type)); }
  Tensor contiguous() const { return is_contiguous() ? *this : Tensor(torch::stable::contiguous(stable())); }
  Tensor clone() const { return torch::stable::clone(stable()); }
  Tensor sum(at::IntArrayRef dims) const { return torch::stable::sum(stable(), dims); }
  Tensor exp() const { return call<1>("aten::exp", "", *this)[0]; }
  Tensor mul(const Tensor& other) const { return call<1>("aten::mul", "Tensor", *this, other)[0]; }

  template <typename T>
  T item() const {
    return static_cast<T>(*to(at::kDouble).template const_data_ptr<double>());
  }

  // A view; `offset` counts from the first element of this one.
  Tensor strided(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset = 0) const {
    Tensor found;
    found.memory_ = memory_, found.data_ = data_ + offset * static_cast<int64_t>(element_size());
    found.sizes_ = sizes, found.strides_ = strides, found.type_ = type_;
    found.cpu_ = cpu_, found.strided_ = strided_, found.whole_ = false;
    return found;
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
    using torch::stable::detail::to;
    std::array<StableIValue, std::max(outputs, sizeof...(Arguments))> stack{passed(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    std::array<Tensor, outputs> found;
    for (size_t n = 0; n < outputs; ++n) found[n] = Tensor(to<Base>(stack[n]));
    return found;
  }

 private:
  static int32_t layout_of(const Base& tensor) {
    int32_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &found));
    return found;
  }
  static size_t storage_size_of(const Base& tensor) {
    int64_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &found));
    return found;
  }
  template <typename T>
  void check_type() const {
    TORCH_CHECK(type_ == c10::CppTypeToScalarType<T>::value, "a tensor is of ", type_, ", and is read as ",
                c10::CppTypeToScalarType<T>::value);
  }
  static StableIValue passed(const Tensor& tensor) { return torch::stable::detail::from(tensor.stable()); }
  template <typename T>
  static StableIValue passed(const T& value) {
    return torch::stable::detail::from(value);
  }

  std::shared_ptr<Memory> memory_;
  char* data_ = nullptr;
  Dimensions sizes_, strides_;
  at::ScalarType type_ = at::kFloat;
  bool cpu_ = true, strided_ = true, whole_ = true;
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
  if (found.numel() > 0) std::memset(found.mutable_data_ptr(), 0, found.numel() * found.element_size());
  return found;
}

}  // namespace at

}  // namespace lissom
