// Unpacks the tensors of thought attention and checks them against the contract; the same for every device.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/tensor.hpp"
#include "contract.hpp"

namespace pyquiet {

// The op's arguments in their order (pyquiet/kernels/thought_attention.py), unread.
struct ThoughtArguments {
  pybind11::handle query, text_key, text_value, path_key, path_value, text_limits, text_start;
  double scale;
  pybind11::handle window, softcap;
};

// [B, H, T, Q] of [B, H, T, Q, D].
inline std::array<int64_t, 4> rows_of(const std::array<int64_t, 5>& shape) {
  return {shape[0], shape[1], shape[2], shape[3]};
}

template <class T, int N>
bool read_optional(pybind11::handle tensor, View<T, N>& view, Device device) {
  return tensor.is_none() || read_tensor(tensor, view, device);
}

template <class E>
bool read_options(const ThoughtArguments& from, ThoughtInputs<E>& a) {
  a.scale = static_cast<float>(from.scale);
  if (!from.window.is_none()) {
    int overflow = 0;
    const long long window = PyLong_AsLongLongAndOverflow(from.window.ptr(), &overflow);
    if (window == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    a.window = overflow > 0 ? INT32_MAX : std::min<int64_t>(window, INT32_MAX);
    if (overflow < 0 || a.window < 1) return false;
  }
  if (!from.softcap.is_none()) {
    const double softcap = from.softcap.cast<double>();
    if (!(softcap >= 1e-30 && softcap <= 1e30)) return false;
    a.softcap = static_cast<float>(softcap);
  }
  return std::fabs(from.scale) <= 1e30 && (a.softcap == 0 || std::fabs(from.scale) / a.softcap <= 1e30);
}

template <class E>
bool fits_contract(const ThoughtInputs<E>& a, Device device) {
  const auto [B, H, T, Q, D] = a.query.shape;
  const int64_t G = a.text_key.shape[1], S = a.text_key.shape[2], P = a.path_key.shape[3];
  if (D % 8 || D < 8 || D > 256 || G < 1 || H % G || Q < 1 || P < Q || S > INT32_MAX - 4096) return false;
  if (P >= 1 << 23 || H * Q >= 1 << 30) return false;  // counted in 32 bits inside a tile
  if (!has_shape<const E, 5>(a.query, {B, H, T, Q, D}) || !has_shape<const E, 4>(a.text_key, {B, G, S, D}) ||
      !has_shape<const E, 4>(a.text_value, {B, G, S, D}) || !has_shape<const E, 5>(a.path_key, {B, G, T, P, D}) ||
      !has_shape<const E, 5>(a.path_value, {B, G, T, P, D}))
    return false;
  if (a.text_limits.shape != std::array<int64_t, 2>{B, T} || (a.text_start && a.text_start.shape[0] != B)) return false;
  if (device != Device::cpu) return true;  // the ranges stand on the device; the kernels there guard themselves
  for (int64_t b = 0; b < B; ++b) {
    if (a.text_start && (*a.text_start.at(b) < 0 || *a.text_start.at(b) > S)) return false;
    for (int64_t t = 0; t < T; ++t)
      if (*a.text_limits.at(b, t) < 0 || *a.text_limits.at(b, t) > S) return false;
  }
  return true;
}

template <class E>
bool read_inputs(const ThoughtArguments& from, ThoughtInputs<E>& a, Device device) {
  return read_tensor(from.query, a.query, device) && read_tensor(from.text_key, a.text_key, device) &&
         read_tensor(from.text_value, a.text_value, device) && read_tensor(from.path_key, a.path_key, device) &&
         read_tensor(from.path_value, a.path_value, device) && read_tensor(from.text_limits, a.text_limits, device) &&
         read_optional(from.text_start, a.text_start, device) && read_options(from, a) && fits_contract(a, device);
}

// Both return false, with nothing written, where an argument breaks the contract; Python then says which and how.
template <class E>
bool read_forward(const ThoughtArguments& from, pybind11::handle out, pybind11::handle lse, Device device,
                  ThoughtAttention<E>& a) {
  return read_inputs(from, a, device) && read_tensor(out, a.out, device) && read_optional(lse, a.lse, device) &&
         has_shape<E, 5>(a.out, a.query.shape) && (!a.lse || a.lse.shape == rows_of(a.query.shape));
}

// saved: out, d_out, lse; gradients: of query, text key and value, path key and value.
template <class E>
bool read_backward(const ThoughtArguments& from, const std::array<pybind11::handle, 3>& saved,
                   const std::array<pybind11::handle, 5>& gradients, Device device, ThoughtAttentionBackward<E>& a) {
  return read_inputs(from, a, device) && read_tensor(saved[0], a.out, device) &&
         read_tensor(saved[1], a.d_out, device) && read_tensor(saved[2], a.lse, device) &&
         read_tensor(gradients[0], a.d_query, device) && read_tensor(gradients[1], a.d_text_key, device) &&
         read_tensor(gradients[2], a.d_text_value, device) && read_tensor(gradients[3], a.d_path_key, device) &&
         read_tensor(gradients[4], a.d_path_value, device) && has_shape<const E, 5>(a.out, a.query.shape) &&
         has_shape<const E, 5>(a.d_out, a.query.shape) && a.lse.shape == rows_of(a.query.shape) &&
         has_shape<E, 5>(a.d_query, a.query.shape) && has_shape<E, 4>(a.d_text_key, a.text_key.shape) &&
         has_shape<E, 4>(a.d_text_value, a.text_value.shape) && has_shape<E, 5>(a.d_path_key, a.path_key.shape) &&
         has_shape<E, 5>(a.d_path_value, a.path_value.shape);
}

}  // namespace pyquiet
