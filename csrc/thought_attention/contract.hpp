// Tokenwise-parallel thought attention (arXiv 2403.09629, section 4.2): what every implementation
// computes.
//
// Query step q of position (b, t) attends, in one softmax, to the text keys s with
//   text_start[b] <= s < text_limits[b, t]
// and to the keys 0 .. P - Q + q of its own path, never to another position's path. It stands at
// position text_limits[b, t] + P - Q + q, text key s at s, path key j at text_limits[b, t] + j;
// with a window it sees a key only if its own position minus the key's is < window. score = scale *
// q.k, then softcap * tanh(score / softcap).
#pragma once

#include "../common/view.hpp"

namespace pyquiet {

struct ThoughtAttention {
  View<const float, 5> query;  // [B, H, T, Q, D]   last dimension contiguous, as in all of them
  View<const float, 4> text_key,
      text_value;                             // [B, G, S, D]      H % G == 0, head h reads h / (H / G)
  View<const float, 5> path_key, path_value;  // [B, G, T, P, D]   P >= Q
  View<const int64_t, 2> text_limits;         // [B, T]            each in 0 .. S
  View<const int64_t, 1> text_start;          // [B]               none: 0
  View<float, 5> out;                         // [B, H, T, Q, D]
  View<float, 4> lse;                         // [B, H, T, Q]      natural logarithm; none: not wanted
  float scale = 1.0f;
  int64_t window = 0;    // 0: none
  float softcap = 0.0f;  // 0: none
  int threads = 1;
};

// One definition an ISA, in namespace pyquiet::<isa>; the result does not depend on `threads`.
using ThoughtAttentionForward = void (*)(const ThoughtAttention&);

}  // namespace pyquiet
