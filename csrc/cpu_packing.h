// Gradients copied into a bucket on a CPU, with their ends in the same reading.
#pragma once

#include "cpu_tiles.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

// The ends of vectors of numbers.
struct VecEnds {
  RawVec lowest, highest;
  RawInt unordered{};  // where a number was NaN

  VecEnds() {
    lowest = splat_<Vec>(__builtin_inff()).raw;
    highest = splat_<Vec>(-__builtin_inff()).raw;
  }
  PYLO_HD void note(Vec x) {
    lowest = x.raw < lowest ? x.raw : lowest;
    highest = x.raw > highest ? x.raw : highest;
    unordered |= x.raw != x.raw;
  }
};

PYLO_HD void note(Ends& ends, float x) {
  if (!(x >= ends.lowest) && ends.lowest == ends.lowest) ends.lowest = x;
  if (!(x <= ends.highest) && ends.highest == ends.highest) ends.highest = x;
}

// Elements at .. at + count of both sides.
static void copy(const Pair& pair, int64_t from_at, int64_t to_at, int64_t count, Ends& ends) {
  constexpr int64_t CHUNK = 512;
  alignas(64) float buffer[CHUNK];
  const bool plain = pair.from_type == FLOAT32 && pair.to_type == FLOAT32;
  const bool same = pair.from_type == pair.to_type;
  VecEnds found;
  for (int64_t at = 0; at < count; at += CHUNK) {
    const int64_t n = count - at < CHUNK ? count - at : CHUNK;
    const float* numbers = static_cast<const float*>(pair.from) + from_at + at;
    float* const to = static_cast<float*>(pair.to) + to_at + at;
    if (!plain) {
      read(buffer, pair.from, pair.from_type, from_at + at, n);
      numbers = buffer;
    }
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const Vec x = load(numbers + i);
      found.note(x);
      if (plain) store(to + i, x);
    }
    for (; i < n; ++i) {
      note(ends, numbers[i]);
      if (plain) to[i] = numbers[i];
    }
    if (!plain && same) {  // bit by bit, NaN too
      __builtin_memcpy(static_cast<uint16_t*>(pair.to) + to_at + at,
                       static_cast<const uint16_t*>(pair.from) + from_at + at, 2 * n);
    } else if (!plain) {
      write(pair.to, pair.to_type, to_at + at, buffer, n);
    }
  }
  if (count >= W) {
    for (int i = 0; i < W; ++i) {
      note(ends, found.lowest[i]);
      note(ends, found.highest[i]);
      if (found.unordered[i]) note(ends, __builtin_nanf(""));
    }
  }
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
