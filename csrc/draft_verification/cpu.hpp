// The CPU entry points, one a level and element type.
#pragma once

#include "../common/isa.hpp"
#include "contract.hpp"

namespace pyquiet {

// The results do not depend on `threads`.
#define PYQUIET_DECLARE(level)                                   \
  namespace level {                                              \
  template <class E>                                             \
  void verify_draft(const DraftVerification<E>& a, int threads); \
  }
PYQUIET_FOR_EACH_ISA(PYQUIET_DECLARE)
#undef PYQUIET_DECLARE

}  // namespace pyquiet
