// Stochastic rounding of state to bfloat16, as pylo_dist/maths/rounding.py has it, bit by bit: the
// random bits are a hash of (seed, step, slot, global index of the element), in words of 32 bits.
// No torch, no CUDA include.
#pragma once

#include "geometry.h"

namespace pylo_dist {

// Which elements of the whole tensor an item's are: local element i is number
// start + i / run * pitch + i % run (pylo_dist/core/shards.py). What a row of `shards` holds.
struct ShardIntegers {
  int64_t start, run, pitch;
};

inline namespace PYLO_ISA {

PYLO_HD int64_t global_index(const ShardIntegers& shard, int64_t local) {
  if (local < shard.run) return shard.start + local;
  return shard.start + local / shard.run * shard.pitch + local % shard.run;
}

// Whether `count` local elements from this one on are neighbours in the whole tensor too, and their
// indices have the same upper word.
PYLO_HD bool neighbours(const ShardIntegers& shard, int64_t local, int count) {
  const int64_t offset = local < shard.run ? local : local % shard.run,
                first = global_index(shard, local);
  return offset + count <= shard.run && first >> 32 == (first + count - 1) >> 32;
}

// Word: uint32_t, or a vector of them.
template <class Word>
PYLO_HD Word mix(Word x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

PYLO_HD uint32_t chained(uint32_t key, uint32_t word) { return mix(key ^ word); }

// The key of a pair of slots where indices have this upper word; `key` is that of seed and step.
PYLO_HD uint32_t key_of(uint32_t key, uint32_t pair, int64_t index) {
  return chained(chained(key, pair), static_cast<uint32_t>(index >> 32));
}

// The bits of x plus 16 random ones, cut off, in the lower halves. NaN and inf stay, and what could
// become infinite is cut off as it is; below that the sum cannot.
template <class Word>
PYLO_HD Word round_to_bfloat16(Word x, Word random) {
  constexpr uint32_t largest = 0x7f7f0000u, infinite = 0x7f800000u;
  const Word magnitude = x & 0x7fffffffu;
  const Word upper = (magnitude >= largest ? x : x + random) >> 16;
  return magnitude > infinite ? Word{} + 0x7fc0u : upper;
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
