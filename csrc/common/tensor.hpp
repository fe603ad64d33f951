// Reads a torch tensor's address, shape, strides and dtype without including or linking torch:
// through the DLPack C exchange table that torch hangs on its Tensor type (tens of nanoseconds), or
// through Python attributes where an older torch has none. Only the bindings include this.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "element.hpp"
#include "view.hpp"

namespace pyquiet {

// The layouts fixed by DLPack 1.x (dmlc.github.io/dlpack), as far as they are needed.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLExchange {
  uint32_t major, minor;
  DLExchange* previous;
  void *allocate, *from_object, *to_object;
  int (*borrow)(void* object, DLTensor* out);
  void* current_stream;
};

inline const DLExchange* exchange_table(pybind11::handle tensor) {
  static const DLExchange* table = [&]() -> const DLExchange* {
    pybind11::object capsule =
        pybind11::getattr(pybind11::type::of(tensor), "__dlpack_c_exchange_api__", pybind11::none());
    if (capsule.is_none()) return nullptr;
    auto* found = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!found) throw pybind11::error_already_set();
    return found->major == 1 ? found : nullptr;
  }();
  return table;
}

enum class Device : int32_t { cpu = 1, cuda = 2 };  // as DLPack numbers them

// How DLPack and torch call an element type.
struct ElementName {
  uint8_t code, bits;
  const char* torch;
};

template <class T>
constexpr ElementName element_name() {
  if constexpr (std::is_same_v<T, float>) return {2, 32, "torch.float32"};
  if constexpr (std::is_same_v<T, BFloat16>) return {4, 16, "torch.bfloat16"};
  if constexpr (std::is_same_v<T, Float16>) return {2, 16, "torch.float16"};
  if constexpr (std::is_same_v<T, int64_t>) return {0, 64, "torch.int64"};
  if constexpr (std::is_same_v<T, bool>) return {6, 8, "torch.bool"};
}

// False if the tensor is not one of T with N dimensions on that kind of device.
template <class T, int N>
bool read_tensor(pybind11::handle tensor, View<T, N>& view, Device device = Device::cpu) {
  constexpr ElementName kName = element_name<std::remove_const_t<T>>();
  if (const DLExchange* table = exchange_table(tensor)) {
    DLTensor t;
    if (table->borrow(tensor.ptr(), &t) != 0) throw pybind11::error_already_set();
    if (t.device_type != static_cast<int32_t>(device) || t.code != kName.code || t.bits != kName.bits || t.ndim != N)
      return false;
    view.data = reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
    for (int d = 0; d < N; ++d) {
      view.shape[d] = t.shape[d];
      view.stride[d] = t.strides[d];
    }
    return true;
  }
  const pybind11::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
  if (!tensor.attr(device == Device::cpu ? "is_cpu" : "is_cuda").cast<bool>() || shape.size() != N ||
      pybind11::str(tensor.attr("dtype")).cast<std::string>() != kName.torch)
    return false;
  view.data = reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  for (int d = 0; d < N; ++d) {
    view.shape[d] = shape[d].cast<int64_t>();
    view.stride[d] = stride[d].cast<int64_t>();
  }
  return true;
}

// Shape as asked (-1: any) and the last dimension contiguous.
template <class T, int N>
bool has_shape(const View<T, N>& view, const std::array<int64_t, N>& shape) {
  for (int d = 0; d < N; ++d)
    if (shape[d] >= 0 && view.shape[d] != shape[d]) return false;
  return view.stride[N - 1] == 1 || view.shape[N - 1] == 1;
}

}  // namespace pyquiet
