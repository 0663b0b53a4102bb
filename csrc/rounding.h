// Stochastic rounding of state to bfloat16, as pylo_dist/maths/rounding.py has it, bit by bit: the
// random bits are a hash of (seed, step, slot, global index of the element), in words of 32 bits.
// No torch. (Not in include/ as long as no CUDA source uses it.)
#pragma once

#include "pylo_dist/geometry.h"

namespace pylo_dist {

// Which elements of the whole tensor an item's are: local element i is number
// start + i / run * pitch + i % run (pylo_dist/core/shards.py). What a row of `shards` holds.
struct ShardIntegers {
  int64_t start, run, pitch;
};

inline namespace PYLO_ISA {

// Global indices of `count` local elements of a shard, from this one on.
PYLO_HD void global_indices(const ShardIntegers& shard, int64_t local, int count, int64_t* to) {
  int64_t offset = local < shard.run ? local : local % shard.run;
  int64_t run = shard.start + (local < shard.run ? 0 : local / shard.run * shard.pitch);
  while (count > 0) {
    const int64_t left = shard.run - offset;
    const int here = left < count ? static_cast<int>(left) : count;
    for (int i = 0; i < here; ++i) to[i] = run + offset + i;
    to += here;
    count -= here;
    offset = 0;
    run += shard.pitch;
  }
}

PYLO_HD uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

PYLO_HD uint32_t chained(uint32_t key, uint32_t word) { return mix(key ^ word); }

// The words of elements with these global indices, for a pair of slots; `key` is that of seed and
// step.
PYLO_HD void random_words(uint32_t key, uint32_t pair, const int64_t* index, int count,
                          uint32_t* to) {
  key = chained(key, pair);
  int64_t differ = 0;
  for (int i = 0; i < count; ++i) differ |= index[i] ^ index[0];
  if (differ >> 32 == 0) {
    key = chained(key, static_cast<uint32_t>(index[0] >> 32));
    for (int i = 0; i < count; ++i) to[i] = mix(static_cast<uint32_t>(index[i]) + key);
    return;
  }
  for (int i = 0; i < count; ++i) {
    const uint32_t high = static_cast<uint32_t>(index[i] >> 32);
    to[i] = mix(static_cast<uint32_t>(index[i]) + chained(key, high));
  }
}

// The bits of x plus 16 random ones, cut off. NaN and inf stay; what the sum would make infinite is
// cut off without it.
PYLO_HD uint16_t round_to_bfloat16(uint32_t x, uint32_t random) {
  constexpr uint32_t infinite = 0x7f800000u;
  const uint32_t sum = x + random;
  const bool kept = (x & infinite) == infinite || (sum & infinite) == infinite;
  const uint32_t upper = (kept ? x : sum) >> 16;
  return static_cast<uint16_t>((x & 0x7fffffffu) > infinite ? 0x7fc0u : upper);
}

// Rounds `count` floats; those of an odd slot with the upper halves of the words.
PYLO_HD void write_rounded(uint16_t* to, const float* from, const uint32_t* words, bool odd,
                           int count) {
  const int shift = odd ? 16 : 0;
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + i, 4);
    to[i] = round_to_bfloat16(bits, words[i] >> shift & 0xffffu);
  }
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
