// Pass C on a CPU: features again, the network, new accumulators and values.
#pragma once

#include "cpu_network.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

template <bool Extended, int H>
struct Updater {
  using L = Layout<Extended>;
  const Box& box;
  const Item& item;
  const Tensors& t;
  const RuleConstants rule;
  const PassArgs& args;
  const Step step;
  const float scale;
  const float* normalisers;
  const Network<Extended, H>& net;
  // Small networks, but for tensors below two dims, take a vector of elements from its inputs to
  // its first layer in registers; floats in long tiles, since there it counts what is done once a
  // tile.
  static constexpr bool IN_REGISTERS = H <= 8;
  static constexpr int LONG = IN_REGISTERS ? 4 * TILE : TILE;
  RawWide squares{};
  Buffers buffers;
  const float* folded_for = nullptr;
  alignas(64) float folded[L::ELEMENT][H];
  alignas(64) float of_row[2 * K][H];
  alignas(64) float x[L::ELEMENT][TILE];
  alignas(64) float first[H][LONG];
  alignas(64) float out[LONG];  // directions

  Updater(const PassArgs& args, const Job& job)
      : box(args.boxes[job.box]),
        item(args.items[box.item]),
        t(args.tensors[box.item]),
        rule(args.rule),
        args(args),
        step(args.steps[box.item]),
        scale(static_cast<float>(args.scale[box.item])),
        normalisers(args.normalisers + args.normalisers_at[box.item]),
        net(*reinterpret_cast<const Network<Extended, H>*>(
            args.networks + args.network_of[box.item] * args.network_bytes)) {}

  // The normaliser of a side's feature.
  PYLO_HD float side_normaliser(const float* norm, bool vector, int s) const {
    return norm[side_input<Extended>(vector == static_cast<bool>(item.vector_is_row), s)];
  }

  // The weights of the element features, times their normalisers.
  PYLO_HD void fold(const float* norm) {
    if (norm == folded_for) return;
    folded_for = norm;
    for (int e = 0; e < L::ELEMENT; ++e) {
      for (int h = 0; h < H; ++h) folded[e][h] = net.element[e][h] * norm[L::input_of(e)];
    }
  }

  // What of the new momenta and mean square of a vector is stored. In bfloat16 it is the same
  // on every machine: where fma_ rounds twice they are computed once more.
  PYLO_HD void store_means(const Element<Vec, Extended>& e, const Tile& tile, int o) {
    Vec m[K] = {e.m[0], e.m[1], e.m[2]}, v = e.v;
    if constexpr (!FUSED) {
      if (args.state_type != FLOAT32) {
        const Vec g = used_gradient(load(tile.g + o), scale, rule);
        for (int k = 0; k < K; ++k) {
          m[k] = fused_(g, splat_<Vec>(rule.momentum_new[k]),
                        load(tile.m[k] + o) * rule.momentum_old[k]);
        }
        v = fused_(g * rule.rms_new, g, load(tile.v + o) * rule.rms_old);
      }
    }
    for (int k = 0; k < K; ++k) store(tile.new_m[k] + o, m[k]);
    store(tile.new_v + o, v);
  }

  // New accumulators, and the element features to x.
  template <bool Diag, bool Dense>
  PYLO_HD void fill(const Tile& tile, const Scales& scales) {
    const RuleConstants constants = rule;
    for (int o = 0; o < tile.count; o += W) {
      const Element<Vec, Extended> e =
          features_at<Extended, Diag, Dense>(tile, o, scale, constants, scales);
      store_means(e, tile, o);
      if constexpr (Diag) {
        for (int k = 0; k < K; ++k) store(tile.new_d[k] + o, e.d[k]);
      }
      for (int f = 0; f < L::ELEMENT; ++f) store(x[f] + o, e.x[f]);
    }
  }

  // In registers, what an input is a factor of is collected first: with
  // F_k(x) = x vector_k constant_k
  //   a = (u + r) + g (w_g + sum of vector_k (constant_k w_Fg_k)) + clip(g) w + p w + v w
  //       + sum of m_k (w_m + vector_k (constant_k w_Fm_k)) + q (w_q + g w_gq + sum of m_k w_mq)
  // which takes a sixth fewer multiplications than one feature after the other, and waits for the
  // root in q but at the end.
  static constexpr int F_G = L::P + 9, F_M = L::FIRST_FACTOR;  // F_k(g), F_k(m)

  // The weights of F_k(g), then of F_k(m), times the constant side's scale of a row.
  PYLO_HD void scale_weights(const Scales& scales) {
    for (int k = 0; k < K; ++k) {
      const float by = *scales.constant[k];
      for (int h = 0; h < H; ++h) {
        of_row[k][h] = by * folded[F_G + k][h];
        of_row[K + k][h] = by * folded[F_M + k][h];
      }
    }
  }

  template <bool Dense, int U>
  PYLO_HD void fill_first(const Tile& tile, const Scales& scales, const float (*u)[U], int at,
                          const float* r) {
    static_assert(Extended);
    const RuleConstants constants = rule;
    for (int o = 0; o < tile.count; o += W) {
      const Element<Vec, Extended> e = common_at<Extended>(tile, o, scale, constants);
      store_means(e, tile, o);
      if constexpr (Dense) prefetch_later(tile, o);
      const Vec g = e.x[0], q = e.x[L::P + 8];
      Vec vector[K], constant[K];
      for (int k = 0; k < K; ++k) {
        vector[k] = load(scales.vector[k] + o);
        if constexpr (!Dense) constant[k] = load(scales.constant[k] + o);
      }
      const auto weight = [&](int f, int h) { return splat_<Vec>(folded[f][h]); };
      const auto scaled = [&](int s, int h) {
        if constexpr (Dense) return splat_<Vec>(of_row[s][h]);
        return constant[s % K] * weight((s < K ? F_G : F_M - K) + s, h);
      };
      Vec sums[H], by[H];
      const auto each = [](const auto& work) {
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) work(h);
      };
      each([&](int h) { sums[h] = load(u[h] + at + o) + splat_<Vec>(r[h]); });
      each([&](int h) { by[h] = fma_(vector[0], scaled(0, h), weight(0, h)); });
      each([&](int h) { by[h] = fma_(vector[1], scaled(1, h), by[h]); });
      each([&](int h) { by[h] = fma_(vector[2], scaled(2, h), by[h]); });
      each([&](int h) { sums[h] = fma_(g, by[h], sums[h]); });
      each([&](int h) { sums[h] = fma_(e.x[1], weight(1, h), sums[h]); });
      each([&](int h) { sums[h] = fma_(e.x[L::P], weight(L::P, h), sums[h]); });
      each([&](int h) { sums[h] = fma_(e.v, weight(L::P + 4, h), sums[h]); });
#pragma GCC unroll 3
      for (int k = 0; k < K; ++k) {
        each([&](int h) { by[h] = fma_(vector[k], scaled(K + k, h), weight(L::P + 1 + k, h)); });
        each([&](int h) { sums[h] = fma_(e.m[k], by[h], sums[h]); });
      }
      each([&](int h) { by[h] = fma_(g, weight(L::FIRST_FACTOR - 1, h), weight(L::P + 8, h)); });
#pragma GCC unroll 3
      for (int k = 0; k < K; ++k) {
        each([&](int h) { by[h] = fma_(e.m[k], weight(L::P + 5 + k, h), by[h]); });
      }
      each([&](int h) { sums[h] = fma_(q, by[h], sums[h]); });
      each([&](int h) { store(first[h] + o, relu_(sums[h])); });
    }
  }

  // From the first layer, which is computed here if that comes from x, to the new values or the
  // direction: the vectors from o on, `Vectors` or, near the end, fewer at a time.
  template <int Vectors, bool FromX, int U>
  PYLO_HD void finish_from(int o, const Tile& tile, const float (*u)[U], const float* r) {
    const Step by = step;
    for (; tile.count - o > (Vectors - 1) * W; o += Vectors * W) {
      if constexpr (FromX) first_layer<Vectors>(L::ELEMENT, x, folded, u, r, o, first);
      Vecs<Vectors> o0, o1;
      outputs_of(net, first, o, o0, o1);
      const Vecs<Vectors> direction = direction_of(o0, o1, by.exp_mult);
      if (t.direction) {
        store(out + o, direction * by.step_size);
        continue;
      }
      const Vecs<Vectors> p = load<Vectors>(tile.p + o), now = moved(p, direction, by),
                          change = now - p;
      store(tile.new_p + o, now);
      RawWide sum = squares;
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i) {
        const int count = tile.count - o - i * W;
        add_square(sum, count < W ? first_of(change.v[i], count) : change.v[i]);
      }
      squares = sum;
    }
    if constexpr (Vectors > 1) finish_from<Vectors - 1, FromX>(o, tile, u, r);
  }

  template <bool FromX, int U>
  PYLO_HD void finish(const Tile& tile, const float (*u)[U], const float* r) {
    finish_from<BLOCK_VECTORS, FromX>(0, tile, u, r);
    if (t.direction) scatter(tile, t.direction, FLOAT32, 0, out);
    unstage(tile, t, args, box.item, !t.direction);
  }

  // Tiles side by side whose u is kept for the next rows: as much as the caches have room for. A
  // small network reads memory row by row then; a large one goes down the rows, and fetches the row
  // below.
  static constexpr int BLOCK = H == 32 ? 1 : 32;

  void dense(const PassArgs& args, const Job& job) {
    const Factors factors = factors_of(item, t, args.factors);
    const Side vector = side_of(factors, item.vector_is_row),
               constant = side_of(factors, !item.vector_is_row);
    alignas(64) float u[H][BLOCK * TILE], side[SIDE][TILE], padded[K][TILE];
    alignas(64) float r[ROWS][H];
    Run runs[ROWS];
    Tile tile;
    tile.pieces = 1;
    const bool floats = all_floats(t, args.state_type);
    for (int64_t first_run = job.first_run; first_run < job.last_run;) {
      const int rows = runs_alike(item, box, job, first_run, runs);
      const float* norm = normalisers + runs[0].lead * L::INPUTS;
      fold(norm);
      for (int i = 0; i < rows; ++i) {
        const int64_t at = item.vector_is_row ? runs[i].col : runs[i].row;
        float of_row[SIDE];
        for (int s = 0; s < SIDE; ++s) {
          const float* from = s < K ? constant.factor : constant.rsqrt;
          of_row[s] = from[s % K * constant.size + at] * side_normaliser(norm, false, s);
        }
        for (int h = 0; h < H; ++h) {
          float sum = 0.0f;
          for (int s = 0; s < SIDE; ++s) sum = fma_(of_row[s], net.constant[s][h], sum);
          r[i][h] = sum;
        }
      }
      const int64_t vector_at = item.vector_is_row ? runs[0].row : runs[0].col;
      for (int64_t block = job.first; block < job.last; block += BLOCK * TILE) {
        const int64_t end = job.last - block < BLOCK * TILE ? job.last : block + BLOCK * TILE;
        for (int64_t j = block; j < end; j += TILE) {
          const int count = static_cast<int>(end - j < TILE ? end - j : TILE);
          for (int s = 0; s < SIDE; ++s) {
            const float* from =
                (s < K ? vector.factor : vector.rsqrt) + s % K * vector.size + vector_at + j;
            const float by = side_normaliser(norm, true, s);
            for (int i = 0; i < count; ++i) side[s][i] = from[i] * by;
            for (int i = count; i < TILE; ++i) side[s][i] = 0.0f;
          }
          side_layer(net.input_bias, side, net.vector, u, static_cast<int>(j - block));
        }
        for (int i = 0; i < rows; ++i) {
          const int64_t constant_at = item.vector_is_row ? runs[i].col : runs[i].row;
          Scales scales;
          for (int k = 0; k < K; ++k)
            scales.constant[k] = constant.scale + k * constant.size + constant_at;
          if constexpr (IN_REGISTERS) scale_weights(scales);
          int64_t j = block;
          if constexpr (IN_REGISTERS) {
            tile.later = AHEAD;
            for (; floats && j + W <= end; j += tile.count) {
              const int64_t whole = (end - j) / W * W, at = runs[i].local + j;
              tile.count = static_cast<int>(whole < LONG ? whole : LONG);
              point(tile, t, item.numel, at);
              for (int k = 0; k < K; ++k)
                scales.vector[k] = vector.scale + k * vector.size + vector_at + j;
              fill_first<true>(tile, scales, u, static_cast<int>(j - block), r[i]);
              finish_from<BLOCK_VECTORS, false>(0, tile, u, r[i]);
              if (t.direction) __builtin_memcpy(t.direction + at, out, 4 * tile.count);
            }
          }
          tile.later = 0;
          for (; j < end; j += TILE) {
            tile.count = static_cast<int>(end - j < TILE ? end - j : TILE);
            vector_scales(scales, vector, vector_at + j, tile.count, padded);
            const int64_t later = BLOCK > 1      ? runs[i].local + j + AHEAD
                                  : i + 1 < rows ? runs[i + 1].local + j
                                                 : runs[0].local + end;
            prefetch(t, args.state_type, item.numel, later);
            tile.piece[0] = Piece{runs[i].local + j, runs[i].row, runs[i].col, 0, tile.count};
            stage(tile, t, args.state_type, item.numel, buffers);
            const int at = static_cast<int>(j - block);
            if constexpr (IN_REGISTERS) {
              fill_first<true>(tile, scales, u, at, r[i]);
            } else {
              fill<false, true>(tile, scales);
            }
            finish<!IN_REGISTERS>(tile, u, r[i]);
          }
        }
      }
      first_run += rows;
    }
  }

  template <bool Diag>
  void anywhere(const PassArgs& args, const Job& job) {
    const Factors factors = factors_of(item, t, args.factors);
    const Side vector = side_of(factors, item.vector_is_row),
               constant = side_of(factors, !item.vector_is_row);
    alignas(64) float vector_side[SIDE][TILE], constant_side[SIDE][TILE], u[H][TILE], r[H][TILE];
    const float zeros[H] = {};
    for_tiles<Diag>(args, job, [&](const Tile& tile, const Scales& scales) {
      const float* norm = normalisers + tile.lead * L::INPUTS;
      fold(norm);
      if constexpr (!Diag) {
        fill_side(tile, box, item.vector_is_row, vector.factor, vector.size, vector_side);
        fill_side(tile, box, item.vector_is_row, vector.rsqrt, vector.size, vector_side + K);
        fill_side(tile, box, !item.vector_is_row, constant.factor, constant.size, constant_side);
        fill_side(tile, box, !item.vector_is_row, constant.rsqrt, constant.size, constant_side + K);
      }
      if constexpr (Diag || !IN_REGISTERS) fill<Diag, false>(tile, scales);
      for (int s = 0; s < SIDE; ++s) {
        const float vector_norm = side_normaliser(norm, true, s),
                    constant_norm = side_normaliser(norm, false, s);
        for (int o = 0; o < TILE; o += W) {
          if constexpr (Diag) {
            Vec d = load(tile.new_d[s % K] + o);
            if (s >= K) d = factor_rsqrt_of(d);
            store(vector_side[s] + o, d * vector_norm);
            store(constant_side[s] + o, d * constant_norm);
          } else {
            store(vector_side[s] + o, load(vector_side[s] + o) * vector_norm);
            store(constant_side[s] + o, load(constant_side[s] + o) * constant_norm);
          }
        }
      }
      side_layer(net.input_bias, vector_side, net.vector, u);
      side_layer(nullptr, constant_side, net.constant, r);
      for (int h = 0; h < H; ++h) {
        for (int o = 0; o < TILE; o += W) store(u[h] + o, load(u[h] + o) + load(r[h] + o));
      }
      if constexpr (!Diag && IN_REGISTERS) fill_first<false>(tile, scales, u, 0, zeros);
      finish<Diag || !IN_REGISTERS>(tile, u, zeros);
    });
  }

  double run(const PassArgs& args, const Job& job) {
    if (is_dense(item, box)) {
      dense(args, job);
    } else if (item.factored) {
      anywhere<false>(args, job);
    } else {
      anywhere<true>(args, job);
    }
    return total(squares);
  }
};

static int64_t network_bytes(int hidden) {
  switch (hidden) {
    case 32:
      return sizeof(Network<false, 32>);
    case 8:
      return sizeof(Network<true, 8>);
    default:
      return sizeof(Network<true, 4>);
  }
}

static void pack(const float* packed, bool vector_is_row, int hidden, void* to) {
  switch (hidden) {
    case 32:
      *static_cast<Network<false, 32>*>(to) = Network<false, 32>(packed, vector_is_row);
      break;
    case 8:
      *static_cast<Network<true, 8>*>(to) = Network<true, 8>(packed, vector_is_row);
      break;
    default:
      *static_cast<Network<true, 4>*>(to) = Network<true, 4>(packed, vector_is_row);
  }
}

static double updates(const PassArgs& args, const Job& job, int hidden) {
  switch (hidden) {
    case 32:
      return Updater<false, 32>(args, job).run(args, job);
    case 8:
      return Updater<true, 8>(args, job).run(args, job);
    default:
      return Updater<true, 4>(args, job).run(args, job);
  }
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
