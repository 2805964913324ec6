// Views and small operators of ATen for chains (chain.h), where PyTorch's dispatcher would take longer than they do.
#pragma once

#include "checks.h"
#include "memory.h"
#include "rows.h"

namespace lissom {
namespace {

// The strides that view x in other sizes; none where that takes a copy. As in ATen's computeStride.
inline std::optional<std::vector<int64_t>> strides_for(const Tensor& x, at::IntArrayRef sizes) {
  if (x.numel() == 0 || x.dim() == 0) return contiguous_strides(sizes);
  std::vector<int64_t> found(sizes.size());
  int64_t view = static_cast<int64_t>(sizes.size()) - 1, base = x.stride(-1), elements = 1, viewed = 1;
  for (int64_t dim = x.dim() - 1; dim >= 0; --dim) {
    elements *= x.size(dim);
    if (dim > 0 && (x.size(dim - 1) == 1 || x.stride(dim - 1) == elements * base)) continue;
    for (; view >= 0 && (viewed < elements || sizes[view] == 1); --view) found[view] = viewed * base, viewed *= sizes[view];
    if (viewed != elements) return std::nullopt;
    if (dim > 0) base = x.stride(dim - 1), elements = viewed = 1;
  }
  return view < 0 ? std::optional(std::move(found)) : std::nullopt;
}

Tensor reshape(const Tensor& x, at::IntArrayRef wanted) {
  std::vector<int64_t> sizes = wanted.vec();
  int64_t known = 1, unknown = -1;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    TORCH_CHECK(sizes[dim] >= 0 || (sizes[dim] == -1 && unknown < 0), "a tensor has no view of the sizes ", wanted);
    if (sizes[dim] < 0) unknown = dim;
    else TORCH_CHECK(!__builtin_mul_overflow(known, sizes[dim], &known), "the sizes ", wanted, " are too large");
  }
  if (unknown >= 0 && known > 0) sizes[unknown] = x.numel() / known, known *= sizes[unknown];
  TORCH_CHECK(known == x.numel() && (unknown < 0 || sizes[unknown] >= 0), "a tensor of the sizes ", x.sizes(),
              " has no view of the sizes ", wanted);
  auto strides = strides_for(x, sizes);
  return strides ? x.strided(sizes, *strides) : x.contiguous().view(sizes);
}

Tensor transpose(const Tensor& x, int64_t one, int64_t other) {
  if (x.dim() == 0) return x;
  return x.transpose(wrapped(one, x.dim()), wrapped(other, x.dim()));
}

Tensor permute(const Tensor& x, at::IntArrayRef order) {
  int64_t dims = x.dim();
  TORCH_CHECK(static_cast<int64_t>(order.size()) == dims, "there are ", dims, " dimensions, and the order is ", order);
  std::vector<int64_t> sizes, strides;
  std::vector<bool> taken(dims);
  for (int64_t given : order) {
    int64_t dim = wrapped(given, dims);
    TORCH_CHECK(!taken[dim], "a dimension is twice in the order ", order);
    taken[dim] = true, sizes.push_back(x.size(dim)), strides.push_back(x.stride(dim));
  }
  return x.strided(sizes, strides);
}

Tensor unsqueeze(const Tensor& x, int64_t given) {
  int64_t dim = wrapped(given, x.dim() + 1);
  auto sizes = x.sizes().vec(), strides = x.strides().vec();
  strides.insert(strides.begin() + dim, dim < x.dim() ? sizes[dim] * strides[dim] : 1);
  sizes.insert(sizes.begin() + dim, 1);
  return x.strided(sizes, strides);
}

Tensor select(const Tensor& x, int64_t given, int64_t index) {
  int64_t dim = wrapped(given, x.dim()), size = x.size(dim);
  TORCH_CHECK_INDEX(index >= -size && index < size, "the index ", index, " is out of range for a dimension of the size ", size);
  auto sizes = x.sizes().vec(), strides = x.strides().vec();
  int64_t offset = (index < 0 ? index + size : index) * strides[dim];
  sizes.erase(sizes.begin() + dim), strides.erase(strides.begin() + dim);
  return x.strided(sizes, strides, offset);
}

Tensor slice(const Tensor& x, int64_t given, std::optional<int64_t> from, std::optional<int64_t> to, int64_t step) {
  int64_t dim = wrapped(given, x.dim()), size = x.size(dim);
  TORCH_CHECK(step > 0, "the step of a slice is ", step, ", and must be positive");
  auto bound = [&](int64_t place) { return std::clamp<int64_t>(place < 0 ? place + size : place, 0, size); };
  int64_t first = bound(from.value_or(0)), last = std::max(first, bound(to.value_or(size)));
  auto sizes = x.sizes().vec(), strides = x.strides().vec();
  int64_t offset = first * strides[dim];
  sizes[dim] = (last - first) / step + ((last - first) % step != 0);
  TORCH_CHECK(!__builtin_mul_overflow(strides[dim], step, &strides[dim]), "the step of a slice is ", step, ", which is too large");
  return x.strided(sizes, strides, offset);
}

Tensor expand(const Tensor& x, at::IntArrayRef wanted, bool) {
  std::vector<int64_t> sizes = wanted.vec();
  int64_t missing = static_cast<int64_t>(sizes.size()) - x.dim();
  for (int64_t dim = 0; dim < static_cast<int64_t>(sizes.size()); ++dim) {
    if (sizes[dim] == -1 && dim >= missing) sizes[dim] = x.size(dim - missing);
    check_size(sizes[dim], "a size to expand to");
  }
  return x.expand(sizes);
}

std::vector<Tensor> split(const Tensor& x, at::IntArrayRef pieces, int64_t given) {
  int64_t dim = wrapped(given, x.dim()), place = 0;
  std::vector<Tensor> found;
  auto sizes = x.sizes().vec();
  for (int64_t piece : pieces) {
    TORCH_CHECK(piece >= 0 && piece <= x.size(dim) - place, "a dimension of the size ", x.size(dim), " is not split into ", pieces);
    sizes[dim] = piece;
    found.push_back(x.strided(sizes, x.strides(), place * x.stride(dim)));
    place += piece;
  }
  TORCH_CHECK(place == x.size(dim), "a dimension of the size ", x.size(dim), " is not split into ", pieces);
  return found;
}

std::vector<Tensor> split_evenly(const Tensor& x, int64_t piece, int64_t dim) {
  TORCH_CHECK(piece > 0, "the pieces of a split have the size ", piece, ", and must have some");
  int64_t size = x.size(dim);
  std::vector<int64_t> pieces(std::max<int64_t>(ceil_div(size, piece), 1), piece);
  pieces.back() = size - piece * (static_cast<int64_t>(pieces.size()) - 1);
  return split(x, pieces, dim);
}

std::vector<Tensor> chunk(const Tensor& x, int64_t count, int64_t dim) {
  TORCH_CHECK(count > 0, "there are ", count, " chunks, and must be some");
  if (x.size(dim) == 0) return split(x, std::vector<int64_t>(count, 0), dim);
  return split_evenly(x, ceil_div(x.size(dim), count), dim);
}

std::vector<Tensor> unbind(const Tensor& x, int64_t dim) {
  std::vector<Tensor> found;
  for (int64_t index = 0; index < x.size(dim); ++index) found.push_back(select(x, dim, index));
  return found;
}

// x + other, whose sizes broadcast to those of x or the other way round.
Tensor add(const Tensor& one, const Tensor& two, int64_t) {
  check_readable(one, "a summand"), check_readable(two, "a summand"), check_dtype(two, one.scalar_type(), "a summand");
  bool larger = two.broadcasts(one.sizes());
  const Tensor &first = larger ? one : two, &second = larger ? two : one;
  Tensor x = first.contiguous(), other = second.expand(first.sizes()).contiguous(), y = allocate(x.sizes(), x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T *a = x.const_data_ptr<T>(), *b = other.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    at::parallel_for(0, ceil_div(y.numel(), kGrain), 1, [&](int64_t from, int64_t until) {
      int64_t end = std::min(y.numel(), until * kGrain);
      for (int64_t i = from * kGrain; i < end; i += kLanes)
        store_some(to + i, load_some(a + i, end - i) + load_some(b + i, end - i), end - i);
    });
    return Tensor();
  });
  return y;
}

// Slices along a dimension, in the order of `given`.
Tensor index_select(const Tensor& x, int64_t along, const Tensor& given) {
  check_readable(x, "x");
  Tensor indices = checked_indices(given);
  TORCH_CHECK(x.dim() > 0 && indices.dim() <= 1, "slices of the sizes ", x.sizes(), " are selected by indices of the sizes ",
              indices.sizes());
  int64_t dim = wrapped(along, x.dim()), count = indices.numel(), outer = 1, inner = 1;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) TORCH_CHECK_INDEX(index[i] >= 0 && index[i] < x.size(dim), "index out of range in self");
  auto sizes = x.sizes().vec();
  sizes[dim] = count;
  Tensor found = allocate(sizes, x.options());
  if (found.numel() == 0) return found;
  bool adjacent = true;
  for (int64_t d = x.dim(); d-- > 0;) {
    if (d > dim) adjacent &= x.size(d) == 1 || x.stride(d) == inner;
    if (d != dim) (d > dim ? inner : outer) *= x.size(d);
  }
  Tensor from = adjacent && outer == 1 ? x : x.contiguous();
  int64_t item = x.element_size(), bytes = inner * item, step = from.stride(dim) * item, whole = from.size(dim) * step;
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* to = static_cast<char*>(found.mutable_data_ptr());
  at::parallel_for(0, outer * count, std::max<int64_t>(1, kGrain / inner), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(to + i * bytes, source + i / count * whole + index[i % count] * step, bytes);
  });
  return found;
}

// Rows of a table; its last three parameters matter to gradients alone.
Tensor embedding(const Tensor& table, const Tensor& given, int64_t, bool, bool) {
  TORCH_CHECK(table.dim() == 2, "a table has ", table.dim(), " dimensions, and must have two");
  Tensor indices = checked_indices(given);
  auto sizes = indices.sizes().vec();
  sizes.push_back(table.size(1));
  return index_select(table, 0, indices.view(indices.numel())).view(sizes);
}

// PyTorch's own, through the dispatcher.
Tensor layer_norm(const Tensor& x, at::IntArrayRef sizes, Optional weight, Optional bias, double eps, bool cudnn) {
  auto stable = [](Optional given) { return given ? std::optional(given->stable()) : std::nullopt; };
  return Tensor::call<1>("aten::layer_norm", "", x, sizes.vec(), stable(weight), stable(bias), eps, cudnn)[0];
}

// Copies the slices of `source` along a dimension to the places of x that `index` names; nothing where one is out of range.
Tensor index_copy_(const Tensor& x, int64_t given, const Tensor& index, const Tensor& source) {
  check_readable(x, "x"), check_readable(source, "source"), check_readable(index, "index"), check_dtype(index, at::kLong, "index");
  check_dtype(source, x.scalar_type(), "source");
  int64_t dims = x.dim(), dim = wrapped(given, dims);
  TORCH_CHECK(source.dim() == dims && index.dim() <= 1 && index.numel() == source.size(dim), "the slices of ", source.sizes(),
              " are copied to ", index.sizes(), " places of ", x.sizes());
  for (int64_t d = 0; d < dims; ++d)
    TORCH_CHECK(d == dim || source.size(d) == x.size(d), "the slices of ", source.sizes(), " do not fit ", x.sizes());
  Tensor places = index.contiguous();
  const int64_t* place = places.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < places.numel(); ++i)
    TORCH_CHECK_INDEX(place[i] >= 0 && place[i] < x.size(dim), "index_copy_(): index ", place[i],
                      " is out of bounds for dimension ", dim, " with size ", x.size(dim));
  if (source.numel() == 0) return x;
  auto sizes = source.sizes(), to_strides = x.strides(), from_strides = source.strides();
  size_t item = x.element_size();
  bool rows = dim < dims - 1 && to_strides[dims - 1] == 1 && from_strides[dims - 1] == 1;  // are copied whole
  int64_t depth = rows ? dims - 1 : dims;
  size_t bytes = rows ? sizes[dims - 1] * item : item;
  auto copy = [&](auto& self, int64_t d, char* to, const char* from) -> void {
    if (d == depth) return static_cast<void>(std::memmove(to, from, bytes));
    for (int64_t i = 0; i < sizes[d]; ++i)
      self(self, d + 1, to + (d == dim ? place[i] : i) * to_strides[d] * item, from + i * from_strides[d] * item);
  };
  copy(copy, 0, static_cast<char*>(x.mutable_data_ptr()), static_cast<const char*>(source.const_data_ptr()));
  return x;
}

}  // namespace
}  // namespace lissom
