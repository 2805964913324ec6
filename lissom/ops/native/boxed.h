// Makes functions of tensors, numbers and texts callable by PyTorch's dispatcher.
#pragma once

#include "tensor.h"

namespace lissom {

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
// PyTorch's own conversion to std::string never frees a copy.
inline std::string text_of(StringHandle handle) {
  const char* data;
  size_t length;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string found(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return found;
}
template <>
struct Taken<std::string_view> {
  static std::string from(StableIValue value) { return text_of(torch::stable::detail::to<StringHandle>(value)); }
};
template <>
struct Taken<std::vector<std::string>> {
  static std::vector<std::string> from(StableIValue value) {
    std::vector<std::string> found;
    for (StringHandle handle : torch::stable::detail::to<std::vector<StringHandle>>(value)) found.push_back(text_of(handle));
    return found;
  }
};
template <>
struct Taken<std::vector<Tensor>> {
  static std::vector<Tensor> from(StableIValue value) {
    auto found = torch::stable::detail::to<std::vector<torch::stable::Tensor>>(value);
    return {std::make_move_iterator(found.begin()), std::make_move_iterator(found.end())};
  }
};

inline StableIValue given(const Tensor& tensor) { return torch::stable::detail::from(tensor.stable()); }
inline StableIValue given(bool value) { return torch::stable::detail::from(value); }
inline StableIValue given(const std::string& value) { return torch::stable::detail::from(value); }
inline StableIValue given(const std::vector<std::string>& value) { return torch::stable::detail::from(value); }
inline StableIValue given(const std::vector<Tensor>& value) {
  std::vector<torch::stable::Tensor> found;
  for (const Tensor& tensor : value) found.push_back(tensor.stable());
  return torch::stable::detail::from(found);
}

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
