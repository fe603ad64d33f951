// What the drivers of kernels on logits make their inputs of.
#pragma once

#include <type_traits>

#include "../../../csrc/common/element.hpp"
#include "../../../csrc/common/view.hpp"

namespace pyquiet {

template <class E>
E element(float x) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

template <class T, size_t N>
View<T, static_cast<int>(N)> view(T* data, const std::array<int64_t, N>& shape) {
  View<T, static_cast<int>(N)> v;
  v.data = data;
  v.shape = shape;
  int64_t stride = 1;
  for (int d = N - 1; d >= 0; --d) {
    v.stride[d] = stride;
    stride *= shape[d];
  }
  return v;
}

}  // namespace pyquiet
