// Stochastic rounding of state to bfloat16, as pylo_dist/maths/rounding.py has it, bit by bit: the
// random bits are a hash of (seed, step, slot, global index of the element), in words of 32 bits.
// No torch, no CUDA include. Slots of the momenta are 0 to 2, that of the mean square 3; two slots
// share a word.
#pragma once

#include "geometry.h"

namespace pylo_dist {

inline namespace PYLO_ISA {

// The number of a local element in the whole tensor (pylo_dist/core/shards.py).
PYLO_HD int64_t global_index(int64_t start, int64_t run, int64_t pitch, int64_t local) {
  int64_t rest = local, runs = 0;
  if (local >= run) runs = divide(local, run, rest);
  return start + runs * pitch + rest;
}

PYLO_HD int64_t global_index(const Item& item, int64_t local) {
  return global_index(item.shard_start, item.shard_run, item.shard_pitch, local);
}

// Whether indices from `first` to `last` have the same upper word.
PYLO_HD bool share_a_key(int64_t first, int64_t last) { return first >> 32 == last >> 32; }

// Whether `count` local elements from this one on are neighbours in the whole tensor too, and their
// indices have the same upper word.
PYLO_HD bool neighbours(const Item& item, int64_t local, int count) {
  const int64_t first = global_index(item, local), last = global_index(item, local + count - 1);
  return last - first == count - 1 && share_a_key(first, last);
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

// The random words of elements that come one by one: those of seed and step, and the keys of the
// pairs of slots, made anew where the upper word of an index is another.
struct Words {
  uint32_t key, of[2];
  int64_t high = -1;

  PYLO_HD explicit Words(uint32_t of_step) : key(of_step), of{} {}

  PYLO_HD void get(int64_t index, uint32_t (&words)[2]) {
    if (index >> 32 != high) {
      high = index >> 32;
      for (uint32_t pair = 0; pair < 2; ++pair) of[pair] = key_of(key, pair, index);
    }
    for (int pair = 0; pair < 2; ++pair) words[pair] = mix(static_cast<uint32_t>(index) + of[pair]);
  }
};

// The 16 random bits of a slot, of its pair's word.
template <class Word>
PYLO_HD Word random_of(Word word, int slot) {
  return slot % 2 ? word >> 16 : word & 0xffffu;
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
