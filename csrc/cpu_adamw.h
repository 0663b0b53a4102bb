// AdamW's step of a tensor's elements on a CPU, and sums of squares.
#pragma once

#include "cpu_tiles.h"
#include "pylo_dist/adamw.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

// Elements `at` .. `at + count` of a tensor as floats: in place where whole vectors of float32 lie
// there, else in `buffer` (TILE), with zeros after them.
PYLO_HD float* staged(const void* from, int64_t type, int64_t at, int count, float* buffer) {
  if (type == FLOAT32 && count == TILE)
    return const_cast<float*>(static_cast<const float*>(from)) + at;
  read(buffer, from, type, at, count);
  for (int i = count; i < TILE; ++i) buffer[i] = 0.0f;
  return buffer;
}

// The random words of `count` elements from `at` on.
PYLO_HD void adamw_words(const AdamWShard& shard, uint32_t key, int64_t at, int count,
                         uint32_t* words) {
  const int64_t first = number_of(shard, at), last = number_of(shard, at + count - 1);
  if (last - first == count - 1 && share_a_key(first, last)) {
    const uint32_t start = static_cast<uint32_t>(first) + key_of(key, 0, first);
    for (int o = 0; o < TILE; o += W) {
      const RawUint word = mix(counting() + (start + static_cast<uint32_t>(o)));
      __builtin_memcpy(words + o, &word, sizeof word);
    }
    return;
  }
  AdamWWords of(key);
  for (int i = 0; i < count; ++i) words[i] = of.get(number_of(shard, at + i));
}

PYLO_HD void write_rounded(void* to, int64_t at, int count, const float* from,
                           const uint32_t* words, int slot) {
  uint16_t* const half = static_cast<uint16_t*>(to) + at;
  if (count == TILE) {
    for (int o = 0; o < TILE; o += W) {
      RawUint word;
      __builtin_memcpy(&word, words + o, sizeof word);
      const RawUint bits = (RawUint)load(from + o).raw, random = random_of(word, slot);
      const RawHalf rounded = __builtin_convertvector(round_to_bfloat16(bits, random), RawHalf);
      __builtin_memcpy(half + o, &rounded, sizeof rounded);
    }
    return;
  }
  for (int i = 0; i < count; ++i) {
    half[i] = static_cast<uint16_t>(round_to_bfloat16(to_bits(from[i]), random_of(words[i], slot)));
  }
}

// Elements first .. last. `key`: where state is bfloat16, else null. Gives the sum of
// (p_new - p)^2.
static double adamw(const AdamWTensors& t, const AdamWRule& rule, const AdamWNumbers& numbers,
                    float scale, const int64_t* key, int64_t first, int64_t last) {
  const int64_t state_type = key ? BFLOAT16 : FLOAT32;
  alignas(64) float buffers[4][TILE];
  alignas(64) uint32_t words[TILE];
  const AdamWRule own = rule;
  const AdamWNumbers of_tensor = numbers;
  RawWide sum{};
  for (int64_t at = first; at < last; at += TILE) {
    const int count = static_cast<int>(last - at < TILE ? last - at : TILE);
    float* const g = staged(t.grad, t.grad_type, at, count, buffers[0]);
    float* const p = staged(t.value, t.value_type, at, count, buffers[1]);
    float* const m = staged(t.mean, state_type, at, count, buffers[2]);
    float* const v = staged(t.square, state_type, at, count, buffers[3]);
    for (int o = 0; o < TILE; o += W) {
      const Vec old = load(p + o);
      const AdamWElement<Vec> e =
          adamw_of(old, load(g + o), load(m + o), load(v + o), scale, own, of_tensor);
      add_square(sum, e.value - old);
      store(p + o, e.value);
      store(m + o, e.mean);
      store(v + o, e.square);
    }
    if (p == buffers[1]) write(t.value, t.value_type, at, p, count);
    if (key) {
      adamw_words(t.shard, static_cast<uint32_t>(*key), at, count, words);
      write_rounded(t.mean, at, count, m, words, 0);
      write_rounded(t.square, at, count, v, words, 1);
    } else if (m == buffers[2]) {
      write(t.mean, FLOAT32, at, m, count);
      write(t.square, FLOAT32, at, v, count);
    }
  }
  return total(sum);
}

// The sum of squares of elements first .. last.
static double squares(const void* x, int64_t type, int64_t first, int64_t last) {
  alignas(64) float buffer[TILE];
  RawWide sum{};
  for (int64_t at = first; at < last; at += TILE) {
    const int count = static_cast<int>(last - at < TILE ? last - at : TILE);
    const float* const from = staged(x, type, at, count, buffer);
    for (int o = 0; o < TILE; o += W) add_square(sum, load(from + o));
  }
  return total(sum);
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
