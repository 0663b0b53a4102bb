// The network of an element, INPUTS -> H -> H -> outputs, and what is done with its first two
// outputs. No torch, no CUDA include.
//
// The order of additions is fixed, and alike in every kernel and layout, so that an element's
// result does not depend on where its tensor was cut. Of the first layer, for hidden unit h, with x
// normalised:
// clang-format off
//   u  = bias + sum of the factor features of the vector side        (depends on the column of a
//                                                                     row-major matrix alone)
//   r  = 0    + sum of the factor features of the constant side      (depends on the row alone)
//   a  = (u + r) + sum of the element features in order
// clang-format on
// Small networks on a CPU add the element features up in an order of their own, which is the same
// in all layouts too (csrc/cpu_updates.h). A side's six features are its K factors, then their K
// rsqrt. The vector side is `col` unless Item::vector_is_row. All sums are chains of fma_.
#pragma once

#include "features.h"

namespace pylo_dist {

// How pass C moves one tensor:
//   p <- p - step_size o0 exp(exp_mult o1) - decay_before p
//   p <- p - decay_after p
struct Step {
  float step_size, exp_mult, decay_before, decay_after;
};

inline namespace PYLO_ISA {

constexpr int SIDE = 2 * K;  // factor features of a side

// A network as compiled.py packs it, float32: input_weight (H, INPUTS) | input_bias (H) |
// hidden_weight (H, H) | hidden_bias (H) | output_weight (2, H) | output_bias (2). The third output
// of VeLO and CELO2 is unused and left out.
template <bool Extended, int H>
struct PackedNetwork {
  static constexpr int INPUTS = Layout<Extended>::INPUTS;
  static constexpr int INPUT_BIAS = H * INPUTS;
  static constexpr int HIDDEN = INPUT_BIAS + H;
  static constexpr int HIDDEN_BIAS = HIDDEN + H * H;
  static constexpr int OUTPUT = HIDDEN_BIAS + H;
  static constexpr int OUTPUT_BIAS = OUTPUT + 2 * H;
  static constexpr int SIZE = OUTPUT_BIAS + 2;
};

// Network input of a side's feature s (0 .. 5): row x3 | col x3 | rsqrt(row) x3 | rsqrt(col) x3
// follow FIRST_FACTOR.
template <bool Extended>
PYLO_HD constexpr int side_input(bool is_row, int s) {
  return Layout<Extended>::FIRST_FACTOR + (s < K ? s : s + K) + (is_row ? 0 : K);
}

template <class T>
PYLO_HD T direction_of(T o0, T o1, float exp_mult) {
  return o0 * exp_(o1 * exp_mult);
}

template <class T>
PYLO_HD T moved(T p, T direction, const Step& s) {
  const T update = direction * s.step_size;
  const T now = p - update - p * s.decay_before;
  return now - now * s.decay_after;
}

// The whole network for one element, scalar: the form of the "highest" precision and of tests.
// x: element features, vector_side and constant_side: SIDE features each, all normalised.
// start: u + r instead of the sides.
template <bool Extended, int H>
PYLO_HD float first_layer_side(const float* network, int h, const float (&side)[SIDE], bool is_row,
                               float start) {
  float sum = start;
  for (int s = 0; s < SIDE; ++s) {
    const int at = h * Layout<Extended>::INPUTS + side_input<Extended>(is_row, s);
    sum = fma_(side[s], network[at], sum);
  }
  return sum;
}

template <bool Extended, int H>
PYLO_HD void mlp(const float* network, const float (&x)[Layout<Extended>::ELEMENT],
                 const float (&start)[H], float& o0, float& o1) {
  using N = PackedNetwork<Extended, H>;
  float first[H];
  for (int h = 0; h < H; ++h) {
    float sum = start[h];
    for (int e = 0; e < Layout<Extended>::ELEMENT; ++e) {
      sum = fma_(x[e], network[h * N::INPUTS + Layout<Extended>::input_of(e)], sum);
    }
    first[h] = relu_(sum);
  }
  o0 = network[N::OUTPUT_BIAS];
  o1 = network[N::OUTPUT_BIAS + 1];
  for (int h = 0; h < H; ++h) {
    float sum = network[N::HIDDEN_BIAS + h];
    for (int i = 0; i < H; ++i) sum = fma_(first[i], network[N::HIDDEN + h * H + i], sum);
    sum = relu_(sum);
    o0 = fma_(sum, network[N::OUTPUT + h], o0);
    o1 = fma_(sum, network[N::OUTPUT + H + h], o1);
  }
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
