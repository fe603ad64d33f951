// Included before a kernel: lets the sanitizers see what memory the instructions read and write that g++ does not
// instrument, tiles and masked loads.
#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cstdint>

namespace sanitizers {

using Word [[gnu::aligned(1), gnu::may_alias]] = uint64_t;

inline const void* read_elements(const void* from, int n) {
  for (int i = 0; i < n; ++i) (void)static_cast<const volatile uint16_t*>(from)[i];
  return from;
}

// 16 rows of 64 bytes, `stride` bytes apart.
inline const void* read_tile(const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    for (int i = 0; i < 8; ++i)
      (void)reinterpret_cast<const volatile Word*>(static_cast<const char*>(from) + row * stride)[i];
  return from;
}

inline void* write_tile(void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    for (int i = 0; i < 8; ++i) reinterpret_cast<volatile Word*>(static_cast<char*>(to) + row * stride)[i] = 0;
  return to;
}

}  // namespace sanitizers

// The masks let the first elements through.
#define _mm512_maskz_loadu_epi16(mask, from) \
  _mm512_maskz_loadu_epi16(mask, sanitizers::read_elements(from, __builtin_popcount(mask)))

#endif

#if defined(__AMX_TILE__)
#undef _tile_loadd
#undef _tile_stored
#define _tile_loadd(tile, from, stride) _tile_loadd_internal(tile, sanitizers::read_tile(from, stride), stride)
#define _tile_stored(tile, to, stride) _tile_stored_internal(tile, sanitizers::write_tile(to, stride), stride)
#endif
