// Large pages for large results. An allocator hands out fresh memory for them at every call, and asking the system for
// it in pieces of 4 KiB takes longer than writing it.
#pragma once

#include "view.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyquiet {

// To be called before the first write. A hint: nothing but speed depends on it.
template <class E, int N>
void prefer_large_pages([[maybe_unused]] const View<E, N>& view) {
#if defined(__linux__)
  constexpr int64_t kLarge = int64_t{32} << 20,
                    kPage = int64_t{2} << 20;  // smaller ones glibc takes from memory it keeps
  int64_t size = sizeof(E);
  for (int dim = 0; dim < N; ++dim) size += (view.shape[dim] - 1) * view.stride[dim] * static_cast<int64_t>(sizeof(E));
  if (size < kLarge) return;
  const int64_t begin = (reinterpret_cast<int64_t>(view.data) + kPage - 1) / kPage * kPage;
  const int64_t end = (reinterpret_cast<int64_t>(view.data) + size) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace pyquiet
