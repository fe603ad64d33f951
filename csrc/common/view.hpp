// A strided, typed window on memory that somebody else owns. Strides count elements, not bytes.
#pragma once

#include <array>
#include <cstdint>

namespace pyquiet {

template <class T, int N>
struct View {
  T* data = nullptr;
  std::array<int64_t, N> shape{};
  std::array<int64_t, N> stride{};

  explicit operator bool() const { return data != nullptr; }

  // Address of the element (or, with fewer indices than dimensions, of the sub-array) at `index`.
  template <class... Index>
  T* at(Index... index) const {
    static_assert(sizeof...(Index) <= N, "more indices than dimensions");
    int64_t offset = 0;
    int dim = 0;
    ((offset += static_cast<int64_t>(index) * stride[dim++]), ...);
    return data + offset;
  }
};

}  // namespace pyquiet
