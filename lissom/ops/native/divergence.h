// The divergence of rows of logits from a teacher's, with its gradient.
#pragma once

#include "checks.h"
#include "vector.h"

#include <tuple>
#include <vector>

namespace lissom {

// The logits of a row over the temperature: their largest, and the sum of e^(logit - largest).
struct Softmax {
  float largest, total;

  template <typename T>
  Softmax(const T* logits, int64_t n, float inverse) {
    Vec high = splat(-std::numeric_limits<float>::infinity()), sums = splat(0.0f);
    int64_t full = n - n % kLanes;
    for (int64_t c = 0; c < full; c += kLanes) high = maximum(load(logits + c), high);
    largest = lissom::largest(high);
    for (int64_t c = full; c < n; ++c) largest = std::max(largest, static_cast<float>(logits[c]));
    largest *= inverse;
    for (int64_t c = 0; c < full; c += kLanes) sums += exponential(load(logits + c) * inverse - largest);
    total = sum(sums);
    for (int64_t c = full; c < n; ++c) total += std::exp(static_cast<float>(logits[c]) * inverse - largest);
  }

  float log_total() const { return largest + std::log(total); }
};

// Σ p (log p - log q) of a row, p the teacher's probabilities and q the student's; its gradient times `share`, (q - p) · share.
// The sums of p and of q are 1, and q - p in every term cancels what the logarithms of the totals are off by.
template <typename T>
float divergence(const T* student, const T* teacher, T* gradient, int64_t n, float inverse, float share) {
  float log_s = Softmax(student, n, inverse).log_total(), log_t = Softmax(teacher, n, inverse).log_total();
  Vec sums = splat(0.0f);
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec log_q = load_some(student + c, n - c) * inverse - log_s, log_p = load_some(teacher + c, n - c) * inverse - log_t;
    Vec p = exponential(log_p), q = exponential(log_q), found = p * (log_p - log_q) + (q - p);
    found = p == splat(0.0f) ? q : found;  // -inf logits
    if (n - c < kLanes) {
      float held[kLanes];
      store(held, found);
      std::fill(held + (n - c), held + kLanes, 0.0f);
      found = load(held);
    }
    sums += found;
    store_some(gradient + c, (q - p) * share, n - c);
  }
  return sum(sums);
}

namespace {

std::tuple<Tensor, Tensor> token_divergence(const Tensor& student, const Tensor& teacher, const Tensor& shares,
                                            double temperature) {
  check_readable(student, "student"), check_readable(teacher, "teacher"), check_readable(shares, "shares");
  TORCH_CHECK(student.dim() == 2 && teacher.sizes() == student.sizes(), "student has the sizes ", student.sizes(),
              " and teacher ", teacher.sizes(), ", and both must be [tokens, vocabulary]");
  int64_t rows = student.size(0), n = student.size(1);
  TORCH_CHECK(shares.dim() == 1 && shares.size(0) == rows, "shares has the sizes ", shares.sizes(), ", and must have [", rows, "]");
  for (const Tensor* given : {&student, &teacher, &shares})
    TORCH_CHECK(given->is_floating_point(), "operands are of floating dtypes, not ", given->scalar_type());
  auto typed = [&](auto zero) {
    using T = decltype(zero);
    auto dtype = c10::CppTypeToScalarType<T>::value;
    Tensor s = student.to(dtype).contiguous(), t = teacher.to(dtype).contiguous(), weights = shares.to(at::kFloat).contiguous();
    Tensor gradient = at::empty_like(s), loss = at::zeros({1}, weights.options());
    std::vector<float> found(rows);
    float inverse = static_cast<float>(1 / temperature);
    const T *from = s.template const_data_ptr<T>(), *wanted = t.template const_data_ptr<T>();
    const float* each = weights.const_data_ptr<float>();
    T* to = gradient.template mutable_data_ptr<T>();
    if (n > 0)
      at::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
          found[row] = each[row] * divergence(from + row * n, wanted + row * n, to + row * n, n, inverse,
                                              each[row] * static_cast<float>(temperature));
      });
    double total = 0;
    for (float one : found) total += one;
    *loss.mutable_data_ptr<float>() = static_cast<float>(total * temperature * temperature);
    return std::make_tuple(loss, gradient.to(student.scalar_type()));
  };
  bool half = student.scalar_type() == at::kBFloat16 && teacher.scalar_type() == at::kBFloat16;
  return half ? typed(BFloat16{}) : typed(float{});
}

}  // namespace
}  // namespace lissom
