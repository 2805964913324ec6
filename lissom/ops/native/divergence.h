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
    for (int64_t c = 0; c < n; c += kLanes)
      sums += first_lanes(exponential(load_some(logits + c, n - c) * inverse - largest), n - c);
    total = sum(sums);
  }

  float log_total() const { return largest + std::log(total); }
};

// e^-d + d - 1, to a relative error of 1e-6 also where d is small and the terms cancel.
inline Vec excess(Vec d) {
  Vec series = splat(1.0f / 40320);
  for (float next : {-1.0f / 5040, 1.0f / 720, -1.0f / 120, 1.0f / 24, -1.0f / 6, 1.0f / 2}) series = series * d + next;
  Vec size = maximum(d, -d);
  return size < splat(0.5f) ? series * d * d : exponential(-d) + d - 1.0f;
}

// Σ p log(p / q) of a row, p the teacher's probabilities and q the student's; its gradient times `share`, (q - p) · share.
// As the sums of p and of q are 1, it is Σ p (q / p + log(p / q) - 1), whose terms are no less than 0 and do not cancel.
template <typename T>
float divergence(const T* student, const T* teacher, T* gradient, int64_t n, float inverse, float share) {
  float log_s = Softmax(student, n, inverse).log_total(), log_t = Softmax(teacher, n, inverse).log_total();
  float between = log_t - log_s;
  Vec sums = splat(0.0f);
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec s = load_some(student + c, n - c), t = load_some(teacher + c, n - c);
    Vec p = exponential(t * inverse - log_t), q = exponential(s * inverse - log_s);
    Vec found = p * excess((t - s) * inverse - between);
    found = p == splat(0.0f) ? q : found;  // -inf logits
    sums += first_lanes(found, n - c);
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
    Tensor gradient = at::empty_like(s), loss = at::zeros({}, weights.options());
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
