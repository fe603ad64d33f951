// The text of thought attention in packed form (packed.hpp), which the tiles of a (b, g) share.
#pragma once

#include "cpu_rows.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {
namespace {

// `matrices` left matrices a (b, g), of keys or values: by rows, [key][channel], or by columns, [channel][key]. Keys
// from S on are zeros; there is a block of them more than S needs, since a block of keys may begin anywhere.
template <class E>
struct PackedText {
  const Problem<E>& p;
  int64_t matrices;
  int64_t width = rounded_up(p.D, 32), length = rounded_up(p.S, kKeyBlock) + kKeyBlock;
  int64_t matrix = width * length, blocks = length / kKeyBlock;
  uint16_t* memory = nullptr;  // of one head or, where they are few, of all

  Packed rows(int64_t slot, int64_t which, int64_t key) const {
    return {memory + (slot * matrices + which) * matrix + key * width, width};
  }
  Packed columns(int64_t slot, int64_t which, int64_t key) const {
    return {memory + (slot * matrices + which) * matrix + key, length};
  }

  // Fills a block of keys of a matrix; `spare` holds two blocks of kKeyBlock x width floats.
  void pack_rows(const E* from, int64_t stride, int64_t block, const Packed& to, float* spare) const {
    copy(from, stride, block, spare);
    pack_left(spare, width, kKeyBlock, static_cast<int>(width / kLanes), to);
  }
  void pack_columns(const E* from, int64_t stride, int64_t block, const Packed& to, float* spare) const {
    copy(from, stride, block, spare);
    float* turned = spare + kKeyBlock * width;
    for (int64_t key = 0; key < kKeyBlock; key += kLanes)
      for (int64_t d = 0; d < width; d += kLanes) {
        F square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(spare + (key + i) * width + d);
        transpose<kLanes>(square);
        for (int i = 0; i < kLanes; ++i) store(turned + (d + i) * kKeyBlock + key, square[i]);
      }
    pack_left(turned, kKeyBlock, width, kKeyBlock / kLanes, to);
  }

 private:
  void copy(const E* from, int64_t stride, int64_t block, float* spare) const {
    const int64_t first = block * kKeyBlock, keys = std::clamp<int64_t>(p.S - first, 0, kKeyBlock);
    for (int64_t i = 0; i < keys; ++i) copy_row(from + (first + i) * stride, p.D, width, spare + i * width);
    std::fill(spare + keys * width, spare + kKeyBlock * width, 0.0f);
  }
};

// The n keys of a block of columns, completed with zeros to a whole depth: a weight of 0 would not silence a NaN there.
inline Packed whole_depth(const Packed& columns, int64_t width, int n, uint16_t* spare) {
  if (n % kDepth == 0) return columns;
  uint16_t kept[kKeyBlock];
  for (int i = 0; i < kKeyBlock; ++i) kept[i] = i < n ? 0xffff : 0;
  for (int64_t d = 0; d < width; ++d)
    for (int i = 0; i < kKeyBlock; ++i) spare[d * kKeyBlock + i] = columns.data[d * columns.stride + i] & kept[i];
  return {spare, kKeyBlock};
}

}  // namespace
}  // namespace PYQUIET_ISA
}  // namespace pyquiet
