// A warp of a GPU on a CPU, for tests of csrc/include/pylo_dist/lanes.h: the programs there run
// over it as over a DeviceWarp.
#pragma once

#include "half.h"
#include "pylo_dist/lanes.h"

namespace pylo_dist {
namespace lanes {

inline uint32_t pack(float x0, float x1) {
  const uint32_t low = half::to_half(half::saturated(x0)),
                 high = half::to_half(half::saturated(x1));
  return low | high << 16;
}

inline void unpack(uint32_t packed, float& x0, float& x1) {
  x0 = half::from_half(static_cast<uint16_t>(packed));
  x1 = half::from_half(static_cast<uint16_t>(packed >> 16));
}

// 32 lanes one after the other. How tensor cores round their sums is not documented. kTruncates,
// the worst that is known of chips with this product: eight products and the accumulator are
// aligned to the largest, cut one bit below its last bit, and added; the sum is cut to float32;
// then the other eight. Otherwise: the sum of all rounded once.
template <bool kTruncates>
struct EmulatedWarp {
  template <class T>
  struct Each {
    T of[32];
    T& operator[](int lane) { return of[lane]; }
    const T& operator[](int lane) const { return of[lane]; }
  };

  template <class F>
  static void lanes(F&& f) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  }

  static float of(const Each<float>& x, int lane) { return x[lane]; }

  template <class X>
  static void quad_sum(X&& x) {
    for (int lane = 0; lane < 32; lane += 4) {
      const float sum = (x(lane) + x(lane + 1)) + (x(lane + 2) + x(lane + 3));
      for (int t = 0; t < 4; ++t) x(lane + t) = sum;
    }
  }

  static float add(const double* terms, int count, float start);

  template <class C, class A, class B>
  static void mma(C&& acc, A&& left, B&& right) {
    float a[16][16], b[16][8], sums[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int q = lane / 4, t = lane % 4;
      for (int j = 0; j < 4; ++j)
        unpack(left(lane).r[j], a[q + 8 * (j & 1)][2 * t + 8 * (j >> 1)],
               a[q + 8 * (j & 1)][2 * t + 8 * (j >> 1) + 1]);
      for (int j = 0; j < 2; ++j)
        unpack(right(lane).r[j], b[2 * t + 8 * j][q], b[2 * t + 8 * j + 1][q]);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        const int row = lane / 4 + 8 * (j >> 1), column = 2 * (lane % 4) + (j & 1);
        double terms[16];
        for (int k = 0; k < 16; ++k) terms[k] = static_cast<double>(a[row][k]) * b[k][column];
        const float start = acc(lane).x[j];
        sums[row][column] =
            kTruncates ? add(terms + 8, 8, add(terms, 8, start)) : add(terms, 16, start);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j)
        acc(lane).x[j] = sums[lane / 4 + 8 * (j >> 1)][2 * (lane % 4) + (j & 1)];
  }
};

template <bool kTruncates>
float EmulatedWarp<kTruncates>::add(const double* terms, int count, float start) {
  double sum = start, largest = start < 0.0f ? -start : start;
  for (int i = 0; i < count; ++i) {
    sum += terms[i];
    const double size = terms[i] < 0.0 ? -terms[i] : terms[i];
    largest = size > largest ? size : largest;
  }
  if (!kTruncates || !(largest > 1e-200) || !(largest < 1e200) || sum != sum)
    return static_cast<float>(sum);
  uint64_t bits;
  std::memcpy(&bits, &largest, 8);
  bits = ((bits >> 52) - 24) << 52;  // half the last bit of a float32 as large as the largest
  double unit;
  std::memcpy(&unit, &bits, 8);
  int64_t units = static_cast<int64_t>(start / unit);
  for (int i = 0; i < count; ++i) units += static_cast<int64_t>(terms[i] / unit);
  const double total = static_cast<double>(units) * unit;
  float cut = static_cast<float>(total);
  if (total > 0.0 ? cut > total : cut < total) {
    uint32_t word;
    std::memcpy(&word, &cut, 4);
    --word;
    std::memcpy(&cut, &word, 4);
  }
  return cut;
}

}  // namespace lanes
}  // namespace pylo_dist
