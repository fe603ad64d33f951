// Unpacks the tensors of thought attention, checks them against the contract and calls the chosen
// ISA's kernel.
#pragma once

#include <cmath>

#include "../common/isa.hpp"
#include "../common/tensor.hpp"
#include "contract.hpp"

namespace pyquiet {

#define PYQUIET_DECLARE(level)                             \
  namespace level {                                        \
  void thought_attention_forward(const ThoughtAttention&); \
  }
PYQUIET_FOR_EACH_ISA(PYQUIET_DECLARE)
#undef PYQUIET_DECLARE

inline bool fits_contract(const ThoughtAttention& a) {
  const auto [B, H, T, Q, D] = a.query.shape;
  const int64_t G = a.text_key.shape[1], S = a.text_key.shape[2], P = a.path_key.shape[3];
  if (D % 8 || D < 8 || D > 256 || G < 1 || H % G || Q < 1 || P < Q || S > INT32_MAX - 4096) return false;
  if (!has_shape<const float, 5>(a.query, {B, H, T, Q, D}) || !has_shape<const float, 4>(a.text_key, {B, G, S, D}) ||
      !has_shape<const float, 4>(a.text_value, {B, G, S, D}) ||
      !has_shape<const float, 5>(a.path_key, {B, G, T, P, D}) ||
      !has_shape<const float, 5>(a.path_value, {B, G, T, P, D}) || !has_shape<float, 5>(a.out, {B, H, T, Q, D}))
    return false;
  if (a.text_limits.shape != std::array<int64_t, 2>{B, T} || (a.text_start && a.text_start.shape[0] != B)) return false;
  if (a.lse && a.lse.shape != std::array<int64_t, 4>{B, H, T, Q}) return false;
  for (int64_t b = 0; b < B; ++b) {
    if (a.text_start && (*a.text_start.at(b) < 0 || *a.text_start.at(b) > S)) return false;
    for (int64_t t = 0; t < T; ++t)
      if (*a.text_limits.at(b, t) < 0 || *a.text_limits.at(b, t) > S) return false;
  }
  return true;
}

// False, with nothing written, where an argument breaks the contract; Python then says which and
// how.
inline bool thought_attention(pybind11::handle query, pybind11::handle text_key, pybind11::handle text_value,
                              pybind11::handle path_key, pybind11::handle path_value, pybind11::handle text_limits,
                              pybind11::handle text_start, pybind11::handle out, pybind11::handle lse, double scale,
                              int64_t window, double softcap, int threads) {
  ThoughtAttention a;
  if (!read_tensor(query, a.query) || !read_tensor(text_key, a.text_key) || !read_tensor(text_value, a.text_value) ||
      !read_tensor(path_key, a.path_key) || !read_tensor(path_value, a.path_value) ||
      !read_tensor(text_limits, a.text_limits) || !read_tensor(out, a.out) ||
      (!text_start.is_none() && !read_tensor(text_start, a.text_start)) || (!lse.is_none() && !read_tensor(lse, a.lse)))
    return false;
  if (!fits_contract(a) || !(std::fabs(scale) <= 1e30) || (softcap != 0 && !(softcap >= 1e-30 && softcap <= 1e30)))
    return false;
  a.scale = static_cast<float>(scale);
  a.window = window;
  a.softcap = static_cast<float>(softcap);
  a.threads = threads;
#define PYQUIET_ROW(level) &level::thought_attention_forward,
  constexpr ThoughtAttentionForward kForward[] = {PYQUIET_FOR_EACH_ISA(PYQUIET_ROW)};
#undef PYQUIET_ROW
  pybind11::gil_scoped_release release;
  kForward[isa_index()](a);
  return true;
}

}  // namespace pyquiet
