// Values and gradients of 16 and 32 bits as floats, and back: the rounding is torch's.
#pragma once

#include "pylo_dist/mlp.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

PYLO_HD float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

PYLO_HD uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

PYLO_HD float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16,
                 rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  // times 2^112: exact, subnormals become normal
  const float magnitude = from_bits(rest) * from_bits(0x77800000u);
  return from_bits((h & 0x7c00) == 0x7c00 ? sign | 0x7f800000u | rest : sign | to_bits(magnitude));
}

PYLO_HD uint16_t float_to_half(float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // subnormal: the sum with 0.5 rounds at 2^-24
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign |
                               ((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

PYLO_HD uint16_t float_to_bfloat(float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void read(float* to, const void* from, int64_t type, int64_t at, int64_t count) {
  if (type == FLOAT32) {
    __builtin_memcpy(to, static_cast<const float*>(from) + at, 4 * count);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(from) + at;
  if (type == BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bits(static_cast<uint32_t>(half[i]) << 16);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(half[i]);
  }
}

static void write(void* to, int64_t type, int64_t at, const float* from, int64_t count) {
  if (type == FLOAT32) {
    __builtin_memcpy(static_cast<float*>(to) + at, from, 4 * count);
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(to) + at;
  if (type == BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_half(from[i]);
  }
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
