// Tokenwise-parallel thought attention (arXiv 2403.09629, section 4.2): what every implementation
// computes.
//
// Query step q of position (b, t) attends, in one softmax, to the text keys s with
//   text_start[b] <= s < text_limits[b, t]
// and to the keys 0 .. P - Q + q of its own path, never to another position's path. It stands at
// position text_limits[b, t] + P - Q + q, text key s at s, path key j at text_limits[b, t] + j;
// with a window it sees a key only if its own position minus the key's is < window. score = scale *
// q.k, then softcap * tanh(score / softcap).
//
// E, the element type, is float, BFloat16 or (on CUDA) Float16; arithmetic is in float.
#pragma once

#include "../common/element.hpp"
#include "../common/view.hpp"

namespace pyquiet {

// What both passes read.
template <class E>
struct ThoughtInputs {
  View<const E, 5> query;  // [B, H, T, Q, D]   last dimension contiguous, as in all of them
  View<const E, 4> text_key,
      text_value;                         // [B, G, S, D]      H % G == 0, head h reads h / (H / G)
  View<const E, 5> path_key, path_value;  // [B, G, T, P, D]   P >= Q
  View<const int64_t, 2> text_limits;     // [B, T]            each in 0 .. S
  View<const int64_t, 1> text_start;      // [B]               none: 0
  float scale = 1.0f;
  int64_t window = 0;    // 0: none
  float softcap = 0.0f;  // 0: none
};

template <class E>
struct ThoughtAttention : ThoughtInputs<E> {
  View<E, 5> out;      // [B, H, T, Q, D]
  View<float, 4> lse;  // [B, H, T, Q]      natural logarithm; none: not wanted
};

// Gradients of sum(out * d_out). With p = exp(score - lse), the lse of the text and the own path together:
//   delta = sum_d out * d_out,  ds = p (d_out . v - delta) scale (1 - tanh^2 with a softcap)
//   d_query = sum_keys ds k,  d_key = sum_rows ds q,  d_value = sum_rows p d_out
// where the rows of a key are those of all heads of its group and of all steps that see it.
template <class E>
struct ThoughtAttentionBackward : ThoughtInputs<E> {
  View<const E, 5> out, d_out;  // [B, H, T, Q, D]
  View<const float, 4> lse;     // [B, H, T, Q]
  View<E, 5> d_query;           // shaped as what they are the gradient of; all of it is written
  View<E, 4> d_text_key, d_text_value;
  View<E, 5> d_path_key, d_path_value;
};

}  // namespace pyquiet
