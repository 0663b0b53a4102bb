// The network of small_fc on tensor cores, written over a Warp: that of a GPU, or one of
// tests/maths/emulated_warp.h on a CPU.
//
// 16 elements of a tensor are the rows of an m16n8k16 product, its columns are 8 hidden units. A
// quad of lanes owns two elements (rows q and q + 8 of quad q): lane 0 of the quad knows g, p, v
// and q = rsqrt(v + eps), lane k knows m_k, m_k q, F_k(g), F_k(m_k) and the row and column features
// of decay k. These are exactly the 2 x 4 slots that the lane has in the left operand, so that
// features need no shuffle; and the accumulators of a layer are the left operand of the next one,
// so that activations need none either. The two outputs of an element arrive in all lanes of its
// quad.
//
// Precision: kParts = 1 rounds operands to float16 ("medium"); kParts = 2 splits them into a
// float16 and the float16 of the rest and adds the three larger products ("high"), but computes the
// two outputs in float32: there a split costs more than it saves, and trained networks have large
// terms that cancel. Accumulators are float32. Range: features are normalised before they are
// rounded, which bounds them by the root of the number of elements; every row of weights is
// multiplied by the power of two that brings its norm into [1, 2), since the rest of a number far
// below 1 would be a subnormal float16, and the column of the next layer that reads its unit
// divided by it; what still exceeds float16 saturates. NaN stays NaN.
//
// A program is written over a Warp: `Each<T>` holds a T per lane, `lanes(f)` runs f(lane) for every
// lane there is to run here (on a GPU the one own lane), `mma` is a product of the whole warp,
// `quad_sum` a sum over four lanes, `of` the value of another lane.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYLO_LANE_FN __device__ __forceinline__
#define PYLO_LANE_UNROLL _Pragma("unroll")
#else
#define PYLO_LANE_FN inline
#define PYLO_LANE_UNROLL
#endif

namespace pylo_dist {
namespace lanes {

constexpr int kHidden = 32;           // units of both hidden layers
constexpr int kTiles = kHidden / 8;   // products that make a hidden layer
constexpr int kSteps = kHidden / 16;  // products that read one; the 28 or 30 features take as many

struct Left {  // two float16 per register; registers 0 and 2 are of row q, 1 and 3 of row q + 8
  uint32_t r[4];
};
struct Right {
  uint32_t r[2];
};
struct Accumulator {  // columns 2 t and 2 t + 1 of rows q and q + 8
  float x[4];
};

// ----------------------------------------------------------------------------------------- float16

// max(x, 0), NaN for NaN
PYLO_LANE_FN float relu(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

// pack: (x0, x1) as float16, x0 in the lower half; beyond the range the largest float16. unpack:
// back. A CPU that runs these programs brings them itself (tests/maths/emulated_warp.h).
#if defined(__CUDACC__)
PYLO_LANE_FN uint32_t pack(float x0, float x1) {
  uint32_t packed = 0;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(x1), "f"(x0));
#endif
  return packed;
}

PYLO_LANE_FN void unpack(uint32_t packed, float& x0, float& x1) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, "
      "high;}"
      : "=f"(x0), "=f"(x1)
      : "r"(packed));
#endif
}
#else
PYLO_LANE_FN uint32_t pack(float x0, float x1);
PYLO_LANE_FN void unpack(uint32_t packed, float& x0, float& x1);
#endif

// pack(relu(x0), relu(x1))
PYLO_LANE_FN uint32_t pack_relu(float x0, float x1) {
#if defined(__CUDA_ARCH__)
  uint32_t packed;
  asm("cvt.rn.relu.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(x1), "f"(x0));
  return packed;
#else
  return pack(relu(x0), relu(x1));
#endif
}

// (x0, x1) in kParts float16 pairs that add up to it
template <int kParts>
PYLO_LANE_FN void split(float x0, float x1, uint32_t (&parts)[kParts]) {
  parts[0] = pack(x0, x1);
  if constexpr (kParts == 2) {
    float h0, h1;
    unpack(parts[0], h0, h1);
    parts[1] = pack(x0 - h0, x1 - h1);
  }
}

template <int kParts>
PYLO_LANE_FN void split_relu(float x0, float x1, uint32_t (&parts)[kParts]) {
  if constexpr (kParts == 1) {
    parts[0] = pack_relu(x0, x1);
  } else {
    split<kParts>(relu(x0), relu(x1), parts);
  }
}

// ------------------------------------------------------------------------------------------- warps

#if defined(__CUDACC__) || defined(PYLO_FIBERS)
// The warp that runs this, on a GPU or as fibers (tests/maths/fibers.h).
struct DeviceWarp {
  template <class T>
  struct Each {
    T own;
    PYLO_LANE_FN T& operator[](int) { return own; }
    PYLO_LANE_FN const T& operator[](int) const { return own; }
  };

  template <class F>
  static PYLO_LANE_FN void lanes(F&& f) {
    f(static_cast<int>(threadIdx.x & 31));
  }

  // x of that lane; all lanes ask together
  static PYLO_LANE_FN float of(const Each<float>& x, int lane) {
#if defined(__CUDA_ARCH__) || defined(PYLO_FIBERS)
    return __shfl_sync(0xffffffffu, x.own, lane);
#else
    return x.own + static_cast<float>(lane);
#endif
  }

  // x(lane) <- (x_0 + x_1) + (x_2 + x_3) over the lanes of its quad
  template <class X>
  static PYLO_LANE_FN void quad_sum(X&& x) {
#if defined(__CUDA_ARCH__) || defined(PYLO_FIBERS)
    float& own = x(0);
    own += __shfl_xor_sync(0xffffffffu, own, 1);
    own += __shfl_xor_sync(0xffffffffu, own, 2);
#endif
  }

  // acc(lane) += left(lane) right(lane), all lanes together
  template <class C, class A, class B>
  static PYLO_LANE_FN void mma(C&& acc, A&& left, B&& right) {
#if defined(__CUDA_ARCH__) || defined(PYLO_FIBERS)
    Accumulator& c = acc(0);
    const Left& a = left(0);
    const Right& b = right(0);
#if defined(PYLO_FIBERS)
    fibers::mma(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
#endif
  }
};
#endif

// ------------------------------------------------------------------------------------------- slots

// The feature in slot j of lane t of a quad, in the order of the rule's features (30 if `extended`,
// else 28); -1 for none. Slots 0..3 are those of the first product, 4..7 of the second.
PYLO_LANE_FN int feature_of_slot(bool extended, int t, int slot) {
  const int p = extended ? 2 : 1, row = extended ? 15 : 13, k = t - 1;
  if (t == 0) {
    switch (slot) {
      case 0:
        return 0;  // g
      case 1:
        return p;  // p
      case 2:
        return p + 4;  // v
      case 3:
        return p + 8;  // q
      case 4:
        return extended ? 1 : -1;  // clip(g)
      case 5:
        return extended ? row - 1 : -1;  // g q
      default:
        return -1;
    }
  }
  switch (slot) {
    case 0:
      return p + 1 + k;  // m_k
    case 1:
      return p + 5 + k;  // m_k q
    case 2:
      return p + 9 + k;  // F_k(g)
    case 3:
      return row + 12 + k;  // F_k(m_k)
    case 4:
      return row + k;  // row factor
    case 5:
      return row + 6 + k;  // rsqrt(row factor)
    case 6:
      return row + 3 + k;  // column factor
    default:
      return row + 9 + k;  // rsqrt(column factor)
  }
}

// The hidden unit in slot j of lane t when a hidden layer is the left operand: columns of tiles 2 s
// and 2 s + 1, s = slot / 4
PYLO_LANE_FN int unit_of_slot(int t, int slot) { return 8 * (slot / 2) + 2 * t + (slot & 1); }

// ----------------------------------------------------------------------------------------- network

// float32, row-major: input (32, stride >= features), hidden (32, 32), output (>= 2, 32); the time
// features are in input_bias.
struct NetworkPointers {
  const float* input_weight;
  int64_t input_stride;
  const float* input_bias;
  const float* hidden_weight;
  const float* hidden_bias;
  const float* output_weight;
  const float* output_bias;
};

// What one lane keeps of the output layer: its part of the right operand, or, in float32, the
// weights of its units.
template <int kParts>
struct OutputWeights {
  Right half[kSteps];
  float scale[2];  // what brings the outputs back
};
template <>
struct OutputWeights<2> {
  float of_unit[kTiles][2][2];  // tile, column, output
};

// What one lane keeps of the network.
template <int kParts>
struct LaneWeights {
  Right input[kSteps][kTiles][kParts], hidden[kSteps][kTiles][kParts];
  OutputWeights<kParts> output;
  float input_bias[kTiles][2], hidden_bias[kTiles][2], output_bias[2];
};

// The left operand of the first layer: features of two elements.
template <int kParts>
struct LaneInputs {
  Left step[kSteps][kParts];
};

// The power of two that brings a norm into [1, 2), from its square
PYLO_LANE_FN float power_of_two_for(float norm_square) {
  float scale = 1.0f;
  for (int i = 0; i < 40 && norm_square >= 4.0f; ++i, scale *= 0.5f) norm_square *= 0.25f;
  for (int i = 0; i < 40 && norm_square > 0.0f && norm_square < 1.0f; ++i, scale *= 2.0f)
    norm_square *= 4.0f;
  return scale;
}

// What the rows of the layers are multiplied by, lane u for unit u of a hidden layer or output u.
template <class Warp>
struct Scales {
  typename Warp::template Each<float> input, hidden, output;
};

template <class Warp>
PYLO_LANE_FN void load_scales(Scales<Warp>& scales, const NetworkPointers& from, int features) {
  const auto scale_rows = [&](auto& to, const auto& of_columns, const float* weight, int64_t stride,
                              int rows, int columns) {
    Warp::lanes([&](int lane) {
      const float* row = weight + lane % rows * stride;
      float square = 0.0f;
      for (int i = 0; i < columns; ++i) {
        const float x = row[i] / of_columns(i);
        square += x * x;
      }
      to[lane] = power_of_two_for(square);
    });
  };
  scale_rows(
      scales.input, [](int) { return 1.0f; }, from.input_weight, from.input_stride, kHidden,
      features);
  scale_rows(
      scales.hidden, [&](int i) { return Warp::of(scales.input, i); }, from.hidden_weight, kHidden,
      kHidden, kHidden);
  scale_rows(
      scales.output, [&](int i) { return Warp::of(scales.hidden, i); }, from.output_weight, kHidden,
      2, kHidden);
}

// Biases differ between tensors of one network, where the iteration counts of their groups do.
template <class Warp, int kParts>
PYLO_LANE_FN void load_biases(typename Warp::template Each<LaneWeights<kParts>>& weights,
                              const Scales<Warp>& scales, const NetworkPointers& from) {
  Warp::lanes([&](int lane) {
    LaneWeights<kParts>& w = weights[lane];
    PYLO_LANE_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      PYLO_LANE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int unit = 8 * i + 2 * (lane & 3) + j;
        w.input_bias[i][j] = Warp::of(scales.input, unit) * from.input_bias[unit];
        w.hidden_bias[i][j] = Warp::of(scales.hidden, unit) * from.hidden_bias[unit];
      }
    }
    PYLO_LANE_UNROLL
    for (int o = 0; o < 2; ++o) {
      const float bias = (kParts == 1 ? Warp::of(scales.output, o) : 1.0f) * from.output_bias[o];
      w.output_bias[o] = kParts == 1 || (lane & 3) == 0 ? bias : 0.0f;
    }
  });
}

// Everything a lane keeps of a network that reads 28 features, or 30 if `extended`.
template <class Warp, int kParts>
PYLO_LANE_FN void load_network(typename Warp::template Each<LaneWeights<kParts>>& weights,
                               Scales<Warp>& scales, const NetworkPointers& from, bool extended) {
  load_scales<Warp>(scales, from, extended ? 30 : 28);
  Warp::lanes([&](int lane) {
    LaneWeights<kParts>& w = weights[lane];
    const int q = lane >> 2, t = lane & 3;
    uint32_t parts[kParts];
    PYLO_LANE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      PYLO_LANE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int slot = 4 * s + 2 * r, f0 = feature_of_slot(extended, t, slot),
                  f1 = feature_of_slot(extended, t, slot + 1);
        const int u0 = unit_of_slot(t, slot), u1 = unit_of_slot(t, slot + 1);
        const float input0 = Warp::of(scales.input, u0), input1 = Warp::of(scales.input, u1);
        const float hidden0 = Warp::of(scales.hidden, u0), hidden1 = Warp::of(scales.hidden, u1);
        PYLO_LANE_UNROLL
        for (int i = 0; i < kTiles; ++i) {
          const float* row = from.input_weight + (8 * i + q) * from.input_stride;
          const float row_scale = Warp::of(scales.input, 8 * i + q);
          split<kParts>(f0 < 0 ? 0.0f : row[f0] * row_scale, f1 < 0 ? 0.0f : row[f1] * row_scale,
                        parts);
          PYLO_LANE_UNROLL
          for (int part = 0; part < kParts; ++part) w.input[s][i][part].r[r] = parts[part];
          row = from.hidden_weight + (8 * i + q) * kHidden;
          const float hidden_scale = Warp::of(scales.hidden, 8 * i + q);
          split<kParts>(row[u0] * (hidden_scale / input0), row[u1] * (hidden_scale / input1),
                        parts);
          PYLO_LANE_UNROLL
          for (int part = 0; part < kParts; ++part) w.hidden[s][i][part].r[r] = parts[part];
        }
        const float* output = from.output_weight;
        if constexpr (kParts == 2) {
          PYLO_LANE_UNROLL
          for (int o = 0; o < 2; ++o) {
            w.output.of_unit[slot / 2][0][o] = output[o * kHidden + u0] / hidden0;
            w.output.of_unit[slot / 2][1][o] = output[o * kHidden + u1] / hidden1;
          }
        } else {
          output += (q & 1) * kHidden;
          const float scale = Warp::of(scales.output, q & 1);  // so all lanes get both outputs
          w.output.half[s].r[r] =
              pack(output[u0] * (scale / hidden0), output[u1] * (scale / hidden1));
        }
      }
    }
    if constexpr (kParts == 1) {
      PYLO_LANE_UNROLL
      for (int o = 0; o < 2; ++o) w.output.scale[o] = 1.0f / Warp::of(scales.output, o);
    }
  });
  load_biases<Warp, kParts>(weights, scales, from);
}

// For inputs whose column side comes before their row side.
template <int kParts>
PYLO_LANE_FN void swap_sides(LaneWeights<kParts>& weights) {
  PYLO_LANE_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    PYLO_LANE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      uint32_t (&r)[2] = weights.input[1][i][part].r;
      const uint32_t first = r[0];
      r[0] = r[1];
      r[1] = first;
    }
  }
}

// Where the accumulators of tile i of a hidden layer begin in a lane.
template <int kParts>
PYLO_LANE_FN Accumulator bias_of(const LaneWeights<kParts>& w, int layer, int i) {
  const float (&x)[2] = layer == 0 ? w.input_bias[i] : w.hidden_bias[i];
  return Accumulator{{x[0], x[1], x[0], x[1]}};
}

// Slots 4 s .. 4 s + 3 of elements 0 and 1 of a lane.
template <int kParts>
PYLO_LANE_FN void pack_inputs(LaneInputs<kParts>& in, int s, const float (&x0)[4],
                              const float (&x1)[4]) {
  uint32_t parts[kParts];
  PYLO_LANE_UNROLL
  for (int r = 0; r < 4; ++r) {
    const float* x = r & 1 ? x1 : x0;
    split<kParts>(x[r & 2], x[(r & 2) + 1], parts);
    PYLO_LANE_UNROLL
    for (int part = 0; part < kParts; ++part) in.step[s][part].r[r] = parts[part];
  }
}

// acc += the product in float16 (kParts = 1) or, smaller terms first, in pairs of float16
template <class Warp, int kParts, class C, class A, class B>
PYLO_LANE_FN void multiply(C&& acc, A&& left, B&& right) {
  if constexpr (kParts == 2) {
    Warp::mma(
        acc, [&](int lane) -> const Left& { return left(lane)[1]; },
        [&](int lane) -> const Right& { return right(lane)[0]; });
    Warp::mma(
        acc, [&](int lane) -> const Left& { return left(lane)[0]; },
        [&](int lane) -> const Right& { return right(lane)[1]; });
  }
  Warp::mma(
      acc, [&](int lane) -> const Left& { return left(lane)[0]; },
      [&](int lane) -> const Right& { return right(lane)[0]; });
}

// Both outputs of two elements per quad: out[lane] = o_0, o_1 of element 0, o_0, o_1 of element 1,
// in all four lanes. bias(lane, layer, i): where the accumulators of tile i of a hidden layer
// begin.
template <class Warp, int kParts, class Bias>
PYLO_LANE_FN void network(const typename Warp::template Each<LaneWeights<kParts>>& w,
                          const typename Warp::template Each<LaneInputs<kParts>>& in,
                          typename Warp::template Each<Accumulator>& out, Bias&& bias) {
  struct Layer {
    Accumulator tile[kTiles];
  };
  struct Operand {
    Left step[kSteps][kParts];
  };
  typename Warp::template Each<Layer> h1, h2;
  typename Warp::template Each<Operand> x;

  Warp::lanes([&](int lane) {
    PYLO_LANE_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      h1[lane].tile[i] = bias(lane, 0, i);
      h2[lane].tile[i] = bias(lane, 1, i);
    }
    PYLO_LANE_UNROLL
    for (int j = 0; j < 4; ++j) out[lane].x[j] = w[lane].output_bias[j & 1];
  });
  const auto activate = [&](typename Warp::template Each<Layer>& h) {
    Warp::lanes([&](int lane) {
      PYLO_LANE_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        PYLO_LANE_UNROLL
        for (int j = 0; j < 2; ++j) {
          uint32_t parts[kParts];
          split_relu<kParts>(h[lane].tile[i].x[2 * j], h[lane].tile[i].x[2 * j + 1], parts);
          PYLO_LANE_UNROLL
          for (int part = 0; part < kParts; ++part)
            x[lane].step[i / 2][part].r[2 * (i & 1) + j] = parts[part];
        }
      }
    });
  };

  PYLO_LANE_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    PYLO_LANE_UNROLL
    for (int i = 0; i < kTiles; ++i)
      multiply<Warp, kParts>([&](int lane) -> Accumulator& { return h1[lane].tile[i]; },
                             [&](int lane) -> const Left* { return in[lane].step[s]; },
                             [&](int lane) -> const Right* { return w[lane].input[s][i]; });
  }
  activate(h1);
  PYLO_LANE_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    PYLO_LANE_UNROLL
    for (int i = 0; i < kTiles; ++i)
      multiply<Warp, kParts>([&](int lane) -> Accumulator& { return h2[lane].tile[i]; },
                             [&](int lane) -> const Left* { return x[lane].step[s]; },
                             [&](int lane) -> const Right* { return w[lane].hidden[s][i]; });
  }
  if constexpr (kParts == 2) {
    Warp::lanes([&](int lane) {
      PYLO_LANE_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        PYLO_LANE_UNROLL
        for (int j = 0; j < 4; ++j) {  // column j & 1 of element j / 2
          const float h = relu(h2[lane].tile[i].x[j]);
          PYLO_LANE_UNROLL
          for (int o = 0; o < 2; ++o)
            out[lane].x[(j & 2) + o] += h * w[lane].output.of_unit[i][j & 1][o];
        }
      }
    });
    PYLO_LANE_UNROLL
    for (int j = 0; j < 4; ++j) Warp::quad_sum([&](int lane) -> float& { return out[lane].x[j]; });
  } else {
    activate(h2);
    PYLO_LANE_UNROLL
    for (int s = 0; s < kSteps; ++s)
      Warp::mma([&](int lane) -> Accumulator& { return out[lane]; },
                [&](int lane) -> const Left& { return x[lane].step[s][0]; },
                [&](int lane) -> const Right& { return w[lane].output.half[s]; });
    Warp::lanes([&](int lane) {
      PYLO_LANE_UNROLL
      for (int j = 0; j < 4; ++j) out[lane].x[j] *= w[lane].output.scale[j & 1];
    });
  }
}

}  // namespace lanes
}  // namespace pylo_dist
