// The network of an element (mlp.h) for a tile of elements.
#pragma once

#include "cpu_tiles.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

// A packed network (mlp.h) in the order in which it is read here: weights of the same input beside
// each other.
template <bool Extended, int H>
struct alignas(64) Network {
  float element[Layout<Extended>::ELEMENT][H];
  float vector[SIDE][H], constant[SIDE][H];
  float hidden[H][H];
  float output[2][H];
  float input_bias[H], hidden_bias[H], output_bias[2];

  PYLO_HD Network(const float* packed, bool vector_is_row) {
    using P = PackedNetwork<Extended, H>;
    for (int h = 0; h < H; ++h) {
      const float* inputs = packed + h * P::INPUTS;
      for (int e = 0; e < Layout<Extended>::ELEMENT; ++e)
        element[e][h] = inputs[Layout<Extended>::input_of(e)];
      for (int s = 0; s < SIDE; ++s) {
        vector[s][h] = inputs[side_input<Extended>(vector_is_row, s)];
        constant[s][h] = inputs[side_input<Extended>(!vector_is_row, s)];
      }
      for (int i = 0; i < H; ++i) hidden[i][h] = packed[P::HIDDEN + h * H + i];
      output[0][h] = packed[P::OUTPUT + h];
      output[1][h] = packed[P::OUTPUT + H + h];
      input_bias[h] = packed[P::INPUT_BIAS + h];
      hidden_bias[h] = packed[P::HIDDEN_BIAS + h];
    }
    output_bias[0] = packed[P::OUTPUT_BIAS];
    output_bias[1] = packed[P::OUTPUT_BIAS + 1];
  }
};

// Vectors of a block that are worked on together, so that sums of 4 outputs stay in registers: 16
// where there are 32 of them.
constexpr int BLOCK_VECTORS = W == 16 ? 4 : 2;
constexpr int OUT = 4;

// sums[j][i] += sum over `count` inputs of x[input][o + i W] weights[input][h + j]
template <int V, int H, int N>
PYLO_HD void add_inputs(Vec (&sums)[OUT][V], int count, const float (*x)[N], int o,
                        const float (*weights)[H], int h) {
#pragma GCC unroll 2
  for (int input = 0; input < count; ++input) {
    Vec in[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) in[i] = load(x[input] + o + i * W);
#pragma GCC unroll 4
    for (int j = 0; j < OUT; ++j) {
      const Vec weight = splat_<Vec>(weights[input][h + j]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sums[j][i] = fma_(in[i], weight, sums[j][i]);
    }
  }
}

// The first layer of V vectors from o on. It starts from u + r (see mlp.h), where r has one number
// per hidden unit, and adds `count` features x by their weights.
template <int V, int H, int U, int N>
PYLO_HD void first_layer(int count, const float (*x)[TILE], const float (*weights)[H],
                         const float (*u)[U], const float* r, int o, float (*first)[N]) {
  for (int h = 0; h < H; h += OUT) {
    Vec sums[OUT][V];
#pragma GCC unroll 4
    for (int j = 0; j < OUT; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sums[j][i] = load(u[h + j] + o + i * W) + splat_<Vec>(r[h + j]);
    }
    add_inputs<V>(sums, count, x, o, weights, h);
#pragma GCC unroll 4
    for (int j = 0; j < OUT; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) store(first[h + j] + o + i * W, relu_(sums[j][i]));
    }
  }
}

// The network's two outputs for V vectors from o on, from their first layer.
template <int V, bool Extended, int H, int N>
PYLO_HD void outputs_of(const Network<Extended, H>& net, const float (*first)[N], int o,
                        Vecs<V>& o0, Vecs<V>& o1) {
  o0 = splat_<Vecs<V>>(net.output_bias[0]);
  o1 = splat_<Vecs<V>>(net.output_bias[1]);
  for (int h = 0; h < H; h += OUT) {
    Vec sums[OUT][V];
#pragma GCC unroll 4
    for (int j = 0; j < OUT; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sums[j][i] = splat_<Vec>(net.hidden_bias[h + j]);
    }
    add_inputs<V>(sums, H, first, o, net.hidden, h);
#pragma GCC unroll 4
    for (int j = 0; j < OUT; ++j) {
      const Vec w0 = splat_<Vec>(net.output[0][h + j]), w1 = splat_<Vec>(net.output[1][h + j]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const Vec hidden = relu_(sums[j][i]);
        o0.v[i] = fma_(hidden, w0, o0.v[i]);
        o1.v[i] = fma_(hidden, w1, o1.v[i]);
      }
    }
  }
}

// u or r along a tile: a chain from `start` over a side's normalised features.
template <int H, int N>
PYLO_HD void side_layer(const float* bias, const float (*side)[TILE], const float (*weights)[H],
                        float (*out)[N], int at = 0) {
  for (int h = 0; h < H; ++h) {
    for (int o = 0; o < TILE; o += W) {
      Vec sum = splat_<Vec>(bias ? bias[h] : 0.0f);
#pragma GCC unroll 6
      for (int s = 0; s < SIDE; ++s) sum = fma_(load(side[s] + o), splat_<Vec>(weights[s][h]), sum);
      store(out[h] + at + o, sum);
    }
  }
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
