// AdamW's step of an element, in the order of roundings of `adamw` in pylo_dist/maths/reference.py:
// nothing is fused, so that a CPU's bits are those of plain PyTorch. No torch, no CUDA include.
#pragma once

#include "geometry.h"
#include "rounding.h"

namespace pylo_dist {

// What a rule computes with, as doubles in this order in a call.
struct AdamWRule {
  float beta_1, new_1, beta_2, new_2;  // new: 1 - beta, taken in double
  float eps, eps_root;
  float clamp;  // inf: none
};
constexpr int ADAMW_RULE_WIDTH = 7;

// Of one tensor: 1 - beta^step of both, and how it moves; a row of `numbers`.
struct AdamWNumbers {
  float correction_1, correction_2, lr, weight_decay, decay_after;
};
constexpr int ADAMW_NUMBERS_WIDTH = 5;

// Which elements of the whole tensor those of a parameter are, see `global_index`.
struct AdamWShard {
  int64_t start, run, pitch;
};

// The tensors of one parameter; `mean` and `square` float32, or bfloat16, then with a shard.
struct AdamWTensors {
  void* value;
  const void* grad;
  void *mean, *square;
  int64_t value_type, grad_type, numel;
  AdamWShard shard;
};

inline namespace PYLO_ISA {

PYLO_HD int64_t number_of(const AdamWShard& shard, int64_t local) {
  return global_index(shard.start, shard.run, shard.pitch, local);
}

// The random words of elements that come one by one, of `mean` the lower half, of `square` the
// upper one.
struct AdamWWords {
  uint32_t key, own;  // of seed and step; of the upper word of the last index too
  int64_t high = -1;

  PYLO_HD explicit AdamWWords(uint32_t of_step) : key(of_step), own(0) {}

  PYLO_HD uint32_t get(int64_t index) {
    if (index >> 32 != high) {
      high = index >> 32;
      own = key_of(key, 0, index);
    }
    return mix(static_cast<uint32_t>(index) + own);
  }
};

// A product that is rounded before anything is added to it: nvcc fuses others.
template <class T, class By>
PYLO_HD T times_(T x, By y) {
  return x * y;
}
#if defined(__CUDA_ARCH__)
PYLO_HD float times_(float x, float y) { return __fmul_rn(x, y); }
#endif

// T: float, or a CPU's vector of them.
template <class T>
struct AdamWElement {
  T mean, square, value;
};

template <class T>
PYLO_HD AdamWElement<T> adamw_of(T value, T grad, T mean, T square, float scale,
                                 const AdamWRule& rule, const AdamWNumbers& numbers) {
  const T g = clamp_(times_(grad, scale), rule.clamp);
  AdamWElement<T> e;
  e.mean = times_(mean, rule.beta_1) + times_(g, rule.new_1);
  e.square = times_(square, rule.beta_2) + times_(times_(g, g), rule.new_2);
  const T root = sqrt_(e.square / splat_<T>(numbers.correction_2) + rule.eps_root) + rule.eps,
          change = e.mean / splat_<T>(numbers.correction_1) / root;
  e.value = value - times_(change + times_(value, numbers.weight_decay), numbers.lr);
  if (numbers.decay_after != 0.0f) e.value = e.value - times_(e.value, numbers.decay_after);
  return e;
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
