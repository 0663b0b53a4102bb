// Pass C on a GPU: normalise, run the network, write momentum, rms, diag and the value.
//
// small_fc has two paths in one kernel. Boxes with long runs go through tensor cores (lanes.h): a
// warp keeps a strip of 32 columns for many runs, the weights and the strip's column features in
// registers. All others, and "highest", are computed in float32 with the weights in shared memory,
// an order of additions as mlp.h has it. VeLO and CELO2, whose networks are small, always are.
#pragma once

#include "cuda_sums.cuh"

namespace pylo_dist {
namespace gpu {

struct UpdateArgs {
  PassArgs pass;
  const float* networks;
  const int64_t* network_of;
  const Step* steps;
  double *param_squares, *update_squares;
  const double* squares;
};

// ------------------------------------------------------------------------------------------ before

constexpr int SLICES = 4;  // blocks that share an item

// A network as the lanes of a warp keep it, by a warp.
template <int kParts>
__device__ __forceinline__ void pack_network(const float* net, uint32_t* packed) {
  using P = PackedNetwork<false, 32>;
  using Weights = lanes::LaneWeights<kParts>;
  static_assert(sizeof(Weights) % 4 == 0 && sizeof(Weights) * 32 <= NETWORK_WORDS * 4,
                "NETWORK_WORDS is too small");
  const lanes::NetworkPointers from{net,
                                    P::INPUTS,
                                    net + P::INPUT_BIAS,
                                    net + P::HIDDEN,
                                    net + P::HIDDEN_BIAS,
                                    net + P::OUTPUT,
                                    net + P::OUTPUT_BIAS};
  lanes::DeviceWarp::Each<Weights> weights;
  lanes::Scales<lanes::DeviceWarp> scales;
  lanes::load_network<lanes::DeviceWarp, kParts>(weights, scales, from, false);
  uint32_t words[sizeof(Weights) / 4];
  memcpy(words, &weights[threadIdx.x], sizeof(Weights));
#pragma unroll
  for (unsigned w = 0; w < sizeof(Weights) / 4; ++w) packed[w * 32 + threadIdx.x] = words[w];
}

// Normalisers (leads, inputs) of every item, its global sum of p^2, and 0 for what is summed next:
// SLICES blocks per item. Then, where kParts is not 0, a block per network that packs it.
template <bool Extended, int kParts>
__global__ void __launch_bounds__(128)
    prepare_kernel(const __grid_constant__ Head head, const UpdateArgs args) {
  using L = Layout<Extended>;
  __shared__ double scratch[MOST_WARPS];
  const Tables& tables = args.pass.tables;
  const int64_t i = blockIdx.x / SLICES, slice = blockIdx.x % SLICES;
  if constexpr (kParts > 0) {
    const int64_t network = static_cast<int64_t>(blockIdx.x) - SLICES * tables.num_items;
    if (network >= 0) {
      if (threadIdx.x < 32) {
        pack_network<kParts>(args.networks + network * PackedNetwork<false, 32>::SIZE,
                             tables.networks + network * NETWORK_WORDS);
      }
      return;
    }
  }
  if (slice == 0) keep_live(head, tables, i);
  const Live live = live_at(head, tables, i);
  if (!is_active(live)) return;
  const Item& item = tables.items[i];
  const double* sums = live.b + item.b_at;
  const int num = item.factored ? L::SUMS_FACTORED : L::SUMS_DIAG;
  float* to = tables.normalisers + tables.normalisers_at[i];
  for (int64_t at = slice * blockDim.x + threadIdx.x; at < item.leads * L::INPUTS;
       at += SLICES * blockDim.x) {
    const int64_t lead = at / L::INPUTS, f = at % L::INPUTS, factor = f - L::FIRST_FACTOR;
    double sum;
    if (factor >= 12) {
      sum = sums[(num - (L::INPUTS - f)) * item.leads + lead];
    } else if (factor < 0) {
      sum = sums[f * item.leads + lead];
    } else if (item.factored) {
      sum = args.squares[item.squares_at + factor * item.leads + lead];
    } else {  // D twice, then its rsqrt twice
      sum = sums[(L::FIRST_FACTOR + factor / 6 * K + factor % K) * item.leads + lead];
    }
    to[at] = normaliser(sum, static_cast<double>(item.lead_numel), args.pass.rule.eps_normalise);
  }
  if (slice != 0) return;
  double total = 0.0;
  for (int64_t l = threadIdx.x; l < item.leads; l += blockDim.x)
    total += sums[L::P * item.leads + l];
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) {
    args.param_squares[i] = total;
    args.update_squares[i] = 0.0;
  }
}

template <int kParts>
__device__ __forceinline__ void unpack_weights(lanes::LaneWeights<kParts>& weights,
                                               const uint32_t* packed, int lane) {
  uint32_t words[sizeof(weights) / 4];
#pragma unroll
  for (unsigned w = 0; w < sizeof(weights) / 4; ++w) words[w] = packed[w * 32 + lane];
  memcpy(&weights, words, sizeof(weights));
}

// ------------------------------------------------------------------------------------------- after

// Writes where a job's elements went, and, in the block that finishes an item, their sum.
__device__ __forceinline__ void finish_job(const UpdateArgs& args, int64_t j, int64_t i,
                                           double change, double* scratch) {
  const Tables& tables = args.pass.tables;
  change = block_sum(change, scratch);
  if (threadIdx.x == 0) tables.partials[j] = change;
  const ItemRange range = tables.ranges[i];
  if (is_last(&tables.counters[i], static_cast<unsigned>(range.last_job - range.first_job))) {
    double sum = 0.0;
    for (int64_t at = range.first_job + threadIdx.x; at < range.last_job; at += blockDim.x)
      sum += tables.partials[at];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) args.update_squares[i] = sum;
  }
}

// The new value of an element, or its direction; gives the square of the change.
__device__ __forceinline__ double move_element(const Live& live, int64_t at, float p, float o0,
                                               float o1, const Step& step) {
  const float direction = direction_of(o0, o1, step.exp_mult);
  if (live.direction) {
    live.direction[at] = direction * step.step_size;
    return 0.0;
  }
  const float now = moved(p, direction, step);
  store_float(live.value, value_type(live), at, now);
  const double change = now - p;
  return change * change;
}

// ----------------------------------------------------------------------------------------- float32

// A network in shared memory, weights of an input beside each other, and the normalisers where an
// item has one set of them.
template <bool Extended, int H>
struct SharedNetwork {
  using P = PackedNetwork<Extended, H>;
  alignas(16) float input[P::INPUTS][H];
  alignas(16) float hidden[H][H];  // [unit][input]
  float output[H][2];
  float input_bias[H], hidden_bias[H], output_bias[2];

  // times: what the weights of an input are multiplied by, or null
  __device__ void load(const float* net, const float* times) {
    for (int i = threadIdx.x; i < H * P::INPUTS; i += blockDim.x) {
      const int f = i % P::INPUTS;
      input[f][i / P::INPUTS] = times ? net[i] * times[f] : net[i];
    }
    for (int i = threadIdx.x; i < H * H; i += blockDim.x) hidden[i / H][i % H] = net[P::HIDDEN + i];
    for (int i = threadIdx.x; i < 2 * H; i += blockDim.x) output[i % H][i / H] = net[P::OUTPUT + i];
    for (int i = threadIdx.x; i < H; i += blockDim.x) {
      input_bias[i] = net[P::INPUT_BIAS + i];
      hidden_bias[i] = net[P::HIDDEN_BIAS + i];
    }
    if (threadIdx.x < 2) output_bias[threadIdx.x] = net[P::OUTPUT_BIAS + threadIdx.x];
  }
};

// acc_h += x w_h
template <int H>
__device__ __forceinline__ void feed(float (&acc)[H], float x, const float* weights) {
#pragma unroll
  for (int h = 0; h < H; ++h) acc[h] = fma_(x, weights[h], acc[h]);
}

template <bool Extended, int H>
__device__ __forceinline__ void hidden_and_output(const SharedNetwork<Extended, H>& net,
                                                  float (&first)[H], float& o0, float& o1) {
#pragma unroll
  for (int h = 0; h < H; ++h) first[h] = relu_(first[h]);
  o0 = net.output_bias[0];
  o1 = net.output_bias[1];
#pragma unroll 1
  for (int h = 0; h < H; ++h) {
    float sum = net.hidden_bias[h];
#pragma unroll
    for (int i = 0; i < H; ++i) sum = fma_(first[i], net.hidden[h][i], sum);
    sum = relu_(sum);
    o0 = fma_(sum, net.output[h][0], o0);
    o1 = fma_(sum, net.output[h][1], o1);
  }
}

// One element of a job: features, network, new state and value. norm: normalisers of the element's
// lead.
template <bool Extended, int H, bool Diag>
__device__ __forceinline__ double update_element(const UpdateArgs& args,
                                                 const SharedNetwork<Extended, H>& net,
                                                 const Item& item, const Live& live,
                                                 const Factors& factors, const Place& at,
                                                 const float* norm, float scale, const Step& step) {
  using L = Layout<Extended>;
  Element<float, Extended> e;
  read_element<Extended, Diag>(e, live, item, factors, at, scale, args.pass.rule);
  float acc[H], constant[H];
#pragma unroll
  for (int h = 0; h < H; ++h) {
    acc[h] = net.input_bias[h];
    constant[h] = 0.0f;
  }
  const bool vector_is_row = item.vector_is_row != 0;
#pragma unroll
  for (int s = 0; s < SIDE; ++s) {
    const int k = s % K, row = side_input<Extended>(true, s), col = side_input<Extended>(false, s);
    float of_row, of_col;
    if constexpr (Diag) {
      of_row = s < K ? e.d[k] : factor_rsqrt_of(e.d[k]);
      of_col = of_row;
    } else {
      of_row = (s < K ? factors.row : factors.row_rsqrt)[k * factors.rows + at.row];
      of_col = (s < K ? factors.col : factors.col_rsqrt)[k * factors.cols + at.col];
    }
    of_row *= norm[row];
    of_col *= norm[col];
    feed<H>(acc, vector_is_row ? of_row : of_col, net.input[vector_is_row ? row : col]);
    feed<H>(constant, vector_is_row ? of_col : of_row, net.input[vector_is_row ? col : row]);
  }
#pragma unroll
  for (int h = 0; h < H; ++h) acc[h] += constant[h];
#pragma unroll
  for (int f = 0; f < L::ELEMENT; ++f)
    feed<H>(acc, e.x[f] * norm[L::input_of(f)], net.input[L::input_of(f)]);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    live.momentum[k * item.numel + at.local] = e.m[k];
    if constexpr (Diag) live.row_or_diag[k * item.numel + at.local] = e.d[k];
  }
  live.rms[at.local] = e.v;
  float o0, o1;
  hidden_and_output<Extended, H>(net, acc, o0, o1);
  return move_element(live, at.local, e.x[L::P], o0, o1, step);
}

// What a lane keeps of its four columns, out of the registers' way: scales, and the share that the
// factor along the run has in the first layer.
template <int H>
struct KeptColumns {
  alignas(16) float of[K + H][32][4];
  int64_t vectors[32];  // what they are of

  __device__ __forceinline__ float* at(int i) { return of[i][threadIdx.x & 31]; }
  __device__ __forceinline__ int64_t& vector() { return vectors[threadIdx.x & 31]; }
};

// C elements of a lane: what was read, then what is written.
template <int C>
struct Elements {
  float g[C], p[C], v[C], m[K][C];
};

// From elements to their two outputs; x.m and x.v become new. numbers: of their run. The
// normalisers are in the weights.
template <int H, int C>
__device__ __forceinline__ void outputs_of(Elements<C>& x, float (&o0)[C], float (&o1)[C],
                                           const SharedNetwork<true, H>& net, const float* numbers,
                                           KeptColumns<H>& kept, int column, float scale,
                                           const RuleConstants& rule) {
  using L = Layout<true>;
  Element<float, true> e[C];
  float acc[C][H];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float m[K], row[K], col[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      m[k] = x.m[k][c];
      row[k] = numbers[k];
      col[k] = kept.at(k)[column + c];
    }
    common_features<true>(e[c], used_gradient(x.g[c], scale, rule), x.p[c], m, x.v[c], rule);
    factored_features<true>(e[c], row, col);
    x.v[c] = e[c].v;
#pragma unroll
    for (int k = 0; k < K; ++k) x.m[k][c] = e[c].m[k];
#pragma unroll
    for (int h = 0; h < H; ++h) acc[c][h] = kept.at(K + h)[column + c] + numbers[4 + h];
  }
#pragma unroll
  for (int f = 0; f < L::ELEMENT; ++f) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const float weight = net.input[L::input_of(f)][h];
#pragma unroll
      for (int c = 0; c < C; ++c) acc[c][h] = fma_(e[c].x[f], weight, acc[c][h]);
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    o0[c] = net.output_bias[0];
    o1[c] = net.output_bias[1];
#pragma unroll
    for (int h = 0; h < H; ++h) acc[c][h] = relu_(acc[c][h]);
  }
#pragma unroll
  for (int h = 0; h < H; ++h) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float sum = net.hidden_bias[h];
#pragma unroll
      for (int i = 0; i < H; ++i) sum = fma_(acc[c][i], net.hidden[h][i], sum);
      sum = relu_(sum);
      o0[c] = fma_(sum, net.output[h][0], o0[c]);
      o1[c] = fma_(sum, net.output[h][1], o1[c]);
    }
  }
}

// The elements of a job with long runs, by warps; gives the sum of the squares of the change.
template <int H, int Type, bool Fours>
__device__ __forceinline__ double update_runs(const SharedNetwork<true, H>& net,
                                              const Runs<4 + H>& runs, KeptColumns<H>& kept,
                                              bool row_varies, bool bias_along, const Step& step,
                                              const RuleConstants& rule) {
  const int left = runs.columns - lane_column<Fours>(0);
  double change = 0.0;
  if (left <= 0) return change;
  const auto move = [&](float p, float o0, float o1) {
    const float now = moved(p, direction_of(o0, o1, step.exp_mult), step);
    const double by = now - p;
    change += by * by;
    return now;
  };
  kept.vector() = -1;
#pragma unroll 1
  for (int r = threadIdx.x >> 5; r < runs.count; r += blockDim.x >> 5) {
    keep_in_shared();
    if (runs.at[r].vector != kept.vector()) {
      const int64_t held = kept.vector() = runs.at[r].vector;
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const int column = lane_column<Fours>(j);
        const int64_t at = column < runs.columns ? held + column * runs.vector_step : held;
#pragma unroll
        for (int k = 0; k < K; ++k) kept.at(k)[j] = runs.vector[k][at];
#pragma unroll
        for (int h = 0; h < H; ++h) {
          float sum = bias_along ? net.input_bias[h] : 0.0f;
#pragma unroll
          for (int s = 0; s < SIDE; ++s)
            sum = fma_(runs.vector_side[s][at], net.input[side_input<true>(row_varies, s)][h], sum);
          kept.at(K + h)[j] = sum;
        }
      }
    }
    const int64_t at = runs.at[r].local + lane_column<Fours>(0);
    const int g_type = runs.grad_type, p_type = runs.value_type;
    if constexpr (Fours) {
      Four<Type> g, p;
      Four<FLOAT32> v, m[K];
      g.load(runs.grad, g_type, at);
      p.load(runs.value, p_type, at);
      v.load(runs.rms, FLOAT32, at);
#pragma unroll
      for (int k = 0; k < K; ++k) m[k].load(runs.momentum[k], FLOAT32, at);
      Elements<4> x;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x.g[j] = g.get(j, g_type);
        x.p[j] = p.get(j, p_type);
        x.v[j] = v.get(j, FLOAT32);
#pragma unroll
        for (int k = 0; k < K; ++k) x.m[k][j] = m[k].get(j, FLOAT32);
      }
      float o0[4], o1[4];
      outputs_of<H, 4>(x, o0, o1, net, runs.numbers[r], kept, 0, runs.scale, rule);
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) m[k].set(j, x.m[k][j], FLOAT32);
        m[k].store(runs.momentum[k], FLOAT32, at);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) v.set(j, x.v[j], FLOAT32);
      v.store(runs.rms, FLOAT32, at);
      if (runs.direction) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          runs.direction[at + j] = direction_of(o0[j], o1[j], step.exp_mult) * step.step_size;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) p.set(j, move(x.p[j], o0[j], o1[j]), p_type);
        p.store(runs.value, p_type, at);
      }
    } else {
#pragma unroll 1
      for (int j = 0; 32 * j < left; ++j) {
        const int64_t here = at + 32 * j;
        Elements<1> x{
            {load_as_float(runs.grad, g_type, here)},
            {load_as_float(runs.value, p_type, here)},
            {runs.rms[here]},
            {{runs.momentum[0][here]}, {runs.momentum[1][here]}, {runs.momentum[2][here]}}};
        float o0[1], o1[1];
        outputs_of<H, 1>(x, o0, o1, net, runs.numbers[r], kept, j, runs.scale, rule);
#pragma unroll
        for (int k = 0; k < K; ++k) runs.momentum[k][here] = x.m[k][0];
        runs.rms[here] = x.v[0];
        if (runs.direction)
          runs.direction[here] = direction_of(o0[0], o1[0], step.exp_mult) * step.step_size;
        else
          store_float(runs.value, p_type, here, move(x.p[0], o0[0], o1[0]));
      }
    }
  }
  return change;
}

template <bool Extended, int H>
struct ScalarShared {
  SharedNetwork<Extended, H> network;
  float norm[PackedNetwork<Extended, H>::INPUTS];
};

// What the small networks need beside, for long runs.
template <int H>
struct RunsShared {
  Runs<4 + H> runs;
  KeptColumns<H> kept[4];
};
template <>
struct RunsShared<32> {};

// A job of a rule with a small network: the normalisers are folded into its weights.
template <int H>
__device__ __forceinline__ double update_small(const UpdateArgs& args, const Job& job,
                                               const Box& box, const Item& item, const Live& live,
                                               const SharedNetwork<true, H>& net,
                                               RunsShared<H>& shared) {
  const bool row_varies = box.row[INNER] != 0, bias_along = row_varies == (item.vector_is_row != 0);
  Runs<4 + H>& runs = shared.runs;
  const Step step = args.steps[box.item];
  runs.set(live, item, box, job, factors_on_device(item, live, args.pass.factors),
           static_cast<float>(args.pass.scale[box.item]), [&](int64_t at, float (&numbers)[4 + H]) {
             for (int k = 0; k < K; ++k) numbers[k] = runs.constant[k][at];
             for (int h = 0; h < H; ++h) numbers[4 + h] = bias_along ? 0.0f : net.input_bias[h];
             for (int s = 0; s < SIDE; ++s) {
               const float x = runs.constant_side[s][at];
               const float* weights = net.input[side_input<true>(!row_varies, s)];
               for (int h = 0; h < H; ++h) numbers[4 + h] = fma_(x, weights[h], numbers[4 + h]);
             }
           });
  KeptColumns<H>& kept = shared.kept[threadIdx.x >> 5];
  const RuleConstants& rule = args.pass.rule;
  if (!in_fours(live, item, box, job))
    return update_runs<H, ANY_TYPE, false>(net, runs, kept, row_varies, bias_along, step, rule);
  if (runs.grad_type != FLOAT32 || runs.value_type != FLOAT32)
    return update_runs<H, ANY_TYPE, true>(net, runs, kept, row_varies, bias_along, step, rule);
  return update_runs<H, FLOAT32, true>(net, runs, kept, row_varies, bias_along, step, rule);
}

template <bool Extended, int H>
__device__ __forceinline__ void scalar_job(const UpdateArgs& args, int64_t j, const Job& job,
                                           ScalarShared<Extended, H>& shared,
                                           RunsShared<H>& of_runs, int64_t& loaded,
                                           double* scratch) {
  constexpr int INPUTS = PackedNetwork<Extended, H>::INPUTS;
  const Tables& tables = args.pass.tables;
  const Box& box = tables.boxes[job.box];
  const int64_t i = box.item;
  const Item& item = tables.items[i];
  const Live& live = tables.live[i];
  const float* norms = tables.normalisers + tables.normalisers_at[i];
  double change = 0.0;
  if (args.pass.moves[i]) {  // alike in all threads
    const int64_t network = args.network_of[i];
    __syncthreads();  // nobody reads the last job's
    // in the weights of the small networks, of which one more reading costs nothing
    const bool folded = Extended && !has_small_leads(item);
    if (network != loaded || Extended) {
      shared.network.load(args.networks + network * PackedNetwork<Extended, H>::SIZE,
                          folded ? norms + job.lead * INPUTS : nullptr);
    }
    loaded = network;
    for (int f = threadIdx.x; f < INPUTS; f += blockDim.x)
      shared.norm[f] = folded ? 1.0f : norms[f];
    __syncthreads();
    if constexpr (Extended) {
      if (folded && has_long_runs(item, box)) {
        change = update_small<H>(args, job, box, item, live, shared.network, of_runs);
        finish_job(args, j, i, change, scratch);
        return;
      }
    }
    const Factors factors = factors_on_device(item, live, args.pass.factors);
    const float scale = static_cast<float>(args.pass.scale[i]);
    const Step step = args.steps[i];
    const JobShape shape(job);
    const uint32_t numel = job_numel(job);
#pragma unroll 1
    for (uint32_t e = threadIdx.x; e < numel; e += blockDim.x) {
      int64_t lead = 0;
      const Place at = shape.place(box, e, item.leads > 1 ? &lead : nullptr);
      const float* norm = item.leads > 1 && !folded ? norms + lead * INPUTS : shared.norm;
      change += item.factored ? update_element<Extended, H, false>(args, shared.network, item, live,
                                                                   factors, at, norm, scale, step)
                              : update_element<Extended, H, true>(args, shared.network, item, live,
                                                                  factors, at, norm, scale, step);
    }
  }
  finish_job(args, j, i, change, scratch);
}

// What nvcc needs to be told, so that none of these spills (0: nothing).
constexpr int scalar_threads(int hidden) { return hidden == 32 ? 256 : 128; }
constexpr int scalar_blocks(int hidden) { return hidden == 32 ? 0 : hidden == 8 ? 3 : 4; }

template <bool Extended, int H>
__global__ void __launch_bounds__(scalar_threads(H), scalar_blocks(H))
    scalar_kernel(const UpdateArgs args) {
  __shared__ ScalarShared<Extended, H> shared;
  __shared__ RunsShared<H> of_runs;
  __shared__ double scratch[MOST_WARPS];
  int64_t loaded = -1;
  const Tables& tables = args.pass.tables;
  for (int64_t j = blockIdx.x; j < tables.num_jobs; j += gridDim.x) {
    const Job& job = tables.jobs[j];
    if (!is_active(tables.live[tables.boxes[job.box].item])) continue;
    scalar_job<Extended, H>(args, j, job, shared, of_runs, loaded, scratch);
  }
}

// ------------------------------------------------------------------------------------ tensor cores

// What a lane reads of an element: its own stream (p in lane 0 of a quad, m_k in lane k), g and v.
struct LaneElement {
  float x, g, v;
};

// A row or column side for one element or, the constant one, for all of a run: normalised factor
// and rsqrt in float16, and the scale.
template <int kParts>
struct LaneSide {
  uint32_t packed[kParts];
  float scale;
};

template <int kParts>
__device__ __forceinline__ void read_side(LaneSide<kParts>& to, const float* factor,
                                          const float* rsqrt, const float* scale, int64_t at,
                                          float factor_norm, float rsqrt_norm, bool here) {
  lanes::split<kParts>(here ? factor[at] * factor_norm : 0.0f, here ? rsqrt[at] * rsqrt_norm : 0.0f,
                       to.packed);
  to.scale = here ? scale[at] : 0.0f;
}

template <int kParts>
__device__ __forceinline__ double tensor_core_job(
    const UpdateArgs& args, const Job& job, const Box& box, const Item& item, const Live& live,
    const lanes::DeviceWarp::Each<lanes::LaneWeights<kParts>>& weights) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane >> 2, t = lane & 3,
            k = t > 0 ? t - 1 : 0;
  const int columns = static_cast<int>(job.last - job.first), strips = (columns + 31) / 32,
            warps = blockDim.x >> 5;
  const int warps_per_strip = warps / strips > 0 ? warps / strips : 1, strip = warp % strips,
            turn = warp / strips;
  const RuleConstants& rule = args.pass.rule;
  const float scale = static_cast<float>(args.pass.scale[box.item]);
  const Step step = args.steps[box.item];
  const float* norms = args.pass.tables.normalisers + args.pass.tables.normalisers_at[box.item];
  const Factors factors = factors_on_device(item, live, args.pass.factors);
  const bool row_varies = box.row[INNER] != 0;
  const int64_t vector_step = row_varies ? box.row[INNER] : box.col[INNER];
  const int64_t vector_size = row_varies ? factors.rows : factors.cols,
                constant_size = row_varies ? factors.cols : factors.rows;
  // the side that changes along the run, and the other, of decay k
  const float* vector[3] = {(row_varies ? factors.row : factors.col) + k * vector_size,
                            (row_varies ? factors.row_rsqrt : factors.col_rsqrt) + k * vector_size,
                            (row_varies ? factors.row_scale : factors.col_scale) + k * vector_size};
  const float* constant[3] = {
      (row_varies ? factors.col : factors.row) + k * constant_size,
      (row_varies ? factors.col_rsqrt : factors.row_rsqrt) + k * constant_size,
      (row_varies ? factors.col_scale : factors.row_scale) + k * constant_size};
  const float vector_norms[2] = {norms[side_input<false>(row_varies, k)],
                                 norms[side_input<false>(row_varies, K + k)]};
  const float constant_norms[2] = {norms[side_input<false>(!row_varies, k)],
                                   norms[side_input<false>(!row_varies, K + k)]};
  float norm[4];
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) norm[slot] = norms[lanes::feature_of_slot(false, t, slot)];
  const float old = rule.momentum_old[k], now = rule.momentum_new[k];
  const void* own = t == 0 ? live.value : live.momentum + k * item.numel;
  const int own_type = t == 0 ? value_type(live) : static_cast<int>(FLOAT32),
            g_type = grad_type(live);

  // elements of a lane: quad q holds columns q, q + 8 (rows of the first product), q + 16 and
  // q + 24 of the strip
  const int64_t column = job.first + 32 * strip + q;  // of element 0
  const int left = turn < warps_per_strip ? columns - 32 * strip - q : 0;
  const auto here = [&](int i) { return 8 * i < left; };
  const auto read = [&](LaneElement(&to)[4], int64_t local) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i].x = here(i) ? load_as_float(own, own_type, local + column + 8 * i) : 0.0f;
      to[i].g = here(i) ? load_as_float(live.grad, g_type, local + column + 8 * i) : 0.0f;
      to[i].v = here(i) ? live.rms[local + column + 8 * i] : 0.0f;
    }
  };

  double change = 0.0;
  LaneSide<kParts> along[4], across;
  int64_t held = -1;
  LaneElement next[4];
  int64_t run = job.first_run + turn;
  if (turn >= warps_per_strip) run = job.last_run;
  if (run < job.last_run) {
    read(next, find_run(box, run).local);
    __syncwarp();  // lane 0 of a quad overwrites the rms that all four have read; later runs have a
                   // product in between
  }
#pragma unroll 1
  for (; run < job.last_run; run += warps_per_strip) {
    const Run at = find_run(box, run);
    LaneElement e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = next[i];
    if (run + warps_per_strip < job.last_run)
      read(next, find_run(box, run + warps_per_strip).local);  // on its way meanwhile
    const int64_t vector_at = row_varies ? at.row : at.col;
    if (vector_at != held) {
      held = vector_at;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        read_side<kParts>(along[i], vector[0], vector[1], vector[2],
                          vector_at + (column + 8 * i) * vector_step, vector_norms[0],
                          vector_norms[1], here(i) && t > 0);
      }
    }
    read_side<kParts>(across, constant[0], constant[1], constant[2], row_varies ? at.col : at.row,
                      constant_norms[0], constant_norms[1], t > 0);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float slots[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * tile + half;
        const float g = used_gradient(e[i].g, scale, rule);
        const float v = fma_(g * rule.rms_new, g, e[i].v * rule.rms_old);
        const float rs = rsqrt_(v + rule.eps_rms);
        const float m = t == 0 ? e[i].x : fma_(g, now, e[i].x * old);
        const float f = along[i].scale * across.scale;
        slots[half][0] = (t == 0 ? g : m) * norm[0];
        slots[half][1] = (t == 0 ? m : m * rs) * norm[1];
        slots[half][2] = (t == 0 ? v : f * g) * norm[2];
        slots[half][3] = (t == 0 ? rs : f * m) * norm[3];
        if (here(i)) {
          const int64_t local = at.local + column + 8 * i;
          if (t == 0)
            live.rms[local] = v;
          else
            live.momentum[k * item.numel + local] = m;
        }
      }
      lanes::DeviceWarp::Each<lanes::LaneInputs<kParts>> in;
      lanes::pack_inputs<kParts>(in[lane], 0, slots[0], slots[1]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t (&r)[4] = in[lane].step[1][part].r;
        r[0] = row_varies ? along[2 * tile].packed[part] : across.packed[part];
        r[1] = row_varies ? along[2 * tile + 1].packed[part] : across.packed[part];
        r[2] = row_varies ? across.packed[part] : along[2 * tile].packed[part];
        r[3] = row_varies ? across.packed[part] : along[2 * tile + 1].packed[part];
      }
      lanes::DeviceWarp::Each<lanes::Accumulator> out;
      lanes::network<lanes::DeviceWarp, kParts>(weights, in, out);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * tile + half;
        if (t == 0 && here(i)) {
          change += move_element(live, at.local + column + 8 * i, e[i].x, out[lane].x[2 * half],
                                 out[lane].x[2 * half + 1], step);
        }
      }
    }
  }
  return change;
}

template <int kParts>
__global__ void __launch_bounds__(128, 2) tensor_core_kernel(const UpdateArgs args) {
  __shared__ ScalarShared<false, 32> shared;
  __shared__ RunsShared<32> of_runs;
  __shared__ double scratch[MOST_WARPS];
  const Tables& tables = args.pass.tables;
  const int lane = threadIdx.x & 31;
  int64_t loaded = -1;
  {
    lanes::DeviceWarp::Each<lanes::LaneWeights<kParts>> weights;
#pragma unroll 1
    for (int64_t j = blockIdx.x; j < tables.num_jobs; j += gridDim.x) {
      const Job job = tables.jobs[j];
      const Box& box = tables.boxes[job.box];
      const Item& item = tables.items[box.item];
      const Live& live = tables.live[box.item];
      if (!is_active(live) || !has_long_runs(item, box)) continue;
      double change = 0.0;
      if (args.pass.moves[box.item]) {
        const int64_t network = args.network_of[box.item];
        if (network != loaded)
          unpack_weights<kParts>(weights[lane], tables.networks + network * NETWORK_WORDS, lane);
        loaded = network;
        change = tensor_core_job<kParts>(args, job, box, item, live, weights);
      }
      finish_job(args, j, box.item, change, scratch);
    }
  }
  loaded = -1;
#pragma unroll 1
  for (int64_t j = blockIdx.x; j < tables.num_jobs; j += gridDim.x) {
    const Job job = tables.jobs[j];
    const Box& box = tables.boxes[job.box];
    if (!is_active(tables.live[box.item]) || has_long_runs(tables.items[box.item], box)) continue;
    scalar_job<false, 32>(args, j, job, shared, of_runs, loaded, scratch);
  }
}

}  // namespace gpu
}  // namespace pylo_dist
