// 16-bit floats on a CPU, for tests of the GPU's programs: to nearest even, as the GPU's own.
#pragma once

#include <cstdint>
#include <cstring>

namespace half {

constexpr float LARGEST = 65504.0f;

inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(0x7fff);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  if (bits < 0x33000000) return sign;  // below half the least subnormal
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const uint32_t mantissa = (bits & 0x7fffff) | 0x800000;
  const int drop = exponent < -14 ? -1 - exponent : 13;  // bits that float16 has not
  const uint32_t kept = mantissa >> drop, rest = mantissa & ((1u << drop) - 1),
                 middle = 1u << (drop - 1);
  const uint32_t rounded = kept + (rest > middle || (rest == middle && (kept & 1)));
  // a carry runs into the exponent, as it should; the leading one of `rounded` counts as one unit
  // of it
  return static_cast<uint16_t>(
      sign | (exponent < -14 ? rounded : (static_cast<uint32_t>(exponent + 14) << 10) + rounded));
}

inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31,
                 mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float small = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float saturated(float x) { return x > LARGEST ? LARGEST : x < -LARGEST ? -LARGEST : x; }

inline float from_bfloat(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace half
