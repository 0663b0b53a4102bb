// The passes over the elements of one job, compiled once per instruction set (cpu_avx512.cpp, cpu_avx2.cpp, cpu_baseline.cpp).
//
// Elements are worked on in tiles of TILE, a structure of arrays. A tile's inputs are read in place where they are 64 contiguous
// floats, else they are copied to a buffer whose pads are zero: there is one sequence of instructions for an element, wherever it
// lies. `Dense` boxes have long runs along which one factor changes (the vector side) and the other does not (the constant side);
// all others, and tensors below two dims, have both sides filled in element by element.
#pragma once

#include "cpu.h"
#include "vector.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

constexpr int TILE = 64;
constexpr int ROWS = 16;       // runs that share the vector side's first layer
constexpr int DENSE_RUN = 32;  // shortest run that is worth it

// ------------------------------------------------------------------------------------------------ dtypes

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
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  const float magnitude = from_bits(rest) * from_bits(0x77800000u);  // * 2^112: exact, subnormals become normal
  return from_bits((h & 0x7c00) == 0x7c00 ? sign | 0x7f800000u | rest : sign | to_bits(magnitude));
}

PYLO_HD uint16_t float_to_half(float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // subnormal: the sum with 0.5 rounds at 2^-24
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13));
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

// ------------------------------------------------------------------------------------------------ pass A

constexpr int CHUNK = 256;

PYLO_HD bool is_dense(const Item& item, const Box& box) {
  const int64_t inner = MAX_DIMS - 1;
  const int64_t vector = item.vector_is_row ? box.row[inner] : box.col[inner];
  const int64_t constant = item.vector_is_row ? box.col[inner] : box.row[inner];
  return item.factored && box.sizes[inner] >= DENSE_RUN && vector == 1 && constant == 0 && box.lead[inner] == 0;
}

struct GradientSums {
  int64_t beyond = 0;
  RawWide squares{};  // of what was not clamped
};

// Squares of R runs of `count` (a multiple of W) gradients: their sums over each run to run_sums, over the runs added to `vector`.
template <int R, bool Clamp, bool HasVector>
PYLO_HD void add_runs(
    const float* const (&g)[R], int count, const GradientLimits& limits, GradientSums& sums, double (&run_sums)[R], double* vector) {
  RawWide of_run[R] = {};
  for (int o = 0; o < count; o += W) {
    RawWide low{}, high{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec x = load(g[r] + o);
      sums.beyond += count_beyond(x, limits.limit);
      RawWide l = low_half(x), h = high_half(x);
      l = l * l;
      h = h * h;
      if constexpr (Clamp) {
        sums.squares += l + h;
        l = min_(l, limits.clamp_square);
        h = min_(h, limits.clamp_square);
      }
      of_run[r] += l + h;
      low += l;
      high += h;
    }
    if constexpr (HasVector) {
      RawWide at[2];
      __builtin_memcpy(at, vector + o, sizeof at);
      at[0] += low;
      at[1] += high;
      __builtin_memcpy(vector + o, at, sizeof at);
    }
  }
  for (int r = 0; r < R; ++r) {
    run_sums[r] = total(of_run[r]);
    if constexpr (!Clamp) sums.squares[0] += run_sums[r];
  }
}

// The gradients at `at` in place, or as floats in `buffer`, whose pads up to a multiple of W are zero.
PYLO_HD const float* gradients_at(
    const Tensors& t, int64_t at, int count, const GradientLimits& limits, GradientSums& sums, float* buffer) {
  if (t.grad_type == FLOAT32 && count % W == 0 && !limits.replace) return static_cast<const float*>(t.grad) + at;
  read(buffer, t.grad, t.grad_type, at, count);
  for (int i = count; i % W; ++i) buffer[i] = 0.0f;
  if (limits.replace) {
    const float largest = t.grad_type == FLOAT32 ? 3.402823466e38f : t.grad_type == BFLOAT16 ? 3.389531390e38f : 65504.0f;
    for (int i = 0; i < count; ++i) {
      const float x = buffer[i];
      sums.beyond += !(__builtin_fabsf(x) <= limits.limit);
      if (x != x) buffer[i] = 0.0f;
      if (__builtin_isinf(x)) buffer[i] = x > 0.0f ? largest : -largest;
    }
  }
  return buffer;
}

template <int R, bool Clamp>
static void dense_runs(
    const Tensors& t, const Run (&runs)[R], int64_t first, int64_t last, const GradientLimits& limits, GradientSums& sums,
    double* vector, double* const (&constant)[R]) {
  alignas(64) float buffers[R][CHUNK];
  GradientLimits counted = limits;
  if (limits.replace) counted.limit = __builtin_inff();  // counted before they were replaced
  for (int64_t j = first; j < last; j += CHUNK) {
    const int count = static_cast<int>(last - j < CHUNK ? last - j : CHUNK);
    const float* g[R];
    for (int r = 0; r < R; ++r) g[r] = gradients_at(t, runs[r].local + j, count, limits, sums, buffers[r]);
    double run_sums[R];
    add_runs<R, Clamp, true>(g, (count + W - 1) / W * W, counted, sums, run_sums, vector + (j - first));
    for (int r = 0; r < R; ++r) *constant[r] += run_sums[r];
  }
}

template <bool Clamp>
static void dense_gradients(
    const PassArgs& args, const Job& job, const GradientLimits& limits, GradientPartial& out, GradientSums& sums) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  double* vector = item.vector_is_row ? out.row - out.rows.first : out.col - out.cols.first;
  double* constant = item.vector_is_row ? out.col - out.cols.first : out.row - out.rows.first;
  int64_t run = job.first_run;
  while (run < job.last_run) {
    Run runs[4];
    int64_t at[4];
    int count = 0;
    for (; count < 4 && run + count < job.last_run; ++count) {
      runs[count] = run_of(box, run + count);
      at[count] = item.vector_is_row ? runs[count].col : runs[count].row;
      if (item.vector_is_row ? runs[count].row != runs[0].row : runs[count].col != runs[0].col) break;
    }
    double* to = vector + (item.vector_is_row ? runs[0].row : runs[0].col) + job.first;
    if (count == 4) {
      double* const sides[4] = {constant + at[0], constant + at[1], constant + at[2], constant + at[3]};
      dense_runs<4, Clamp>(t, runs, job.first, job.last, limits, sums, to, sides);
      run += 4;
    } else {
      const Run one[1] = {runs[0]};
      double* const side[1] = {constant + at[0]};
      dense_runs<1, Clamp>(t, one, job.first, job.last, limits, sums, to, side);
      run += 1;
    }
  }
}

static void gradients(const PassArgs& args, const Job& job, const GradientLimits& limits, GradientPartial& out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  GradientSums sums;
  if (is_dense(item, box)) {
    if (limits.clamp_square < __builtin_inf()) {
      dense_gradients<true>(args, job, limits, out, sums);
    } else {
      dense_gradients<false>(args, job, limits, out, sums);
    }
  } else {
    constexpr int inner = MAX_DIMS - 1;
    alignas(64) float buffer[CHUNK];
    GradientLimits counted = limits;
    if (limits.replace) counted.limit = __builtin_inff();
    for (int64_t run = job.first_run; run < job.last_run; ++run) {
      const Run at = run_of(box, run);
      for (int64_t j = job.first; j < job.last; j += CHUNK) {
        const int count = static_cast<int>(job.last - j < CHUNK ? job.last - j : CHUNK);
        const float* g[1] = {gradients_at(t, at.local + j, count, limits, sums, buffer)};
        double run_sum[1];
        add_runs<1, false, false>(g, (count + W - 1) / W * W, counted, sums, run_sum, nullptr);
        if (!item.factored) continue;
        double* row = out.row - out.rows.first + at.row + j * box.row[inner];
        double* col = out.col - out.cols.first + at.col + j * box.col[inner];
        for (int i = 0; i < count; ++i) {
          const double square = min_(static_cast<double>(g[0][i]) * static_cast<double>(g[0][i]), limits.clamp_square);
          row[i * box.row[inner]] += square;
          col[i * box.col[inner]] += square;
        }
      }
    }
  }
  out.audit[0] += static_cast<double>(sums.beyond);
  out.audit[1] += total(sums.squares);
}

static void moments(const Tensors& t, int64_t numel, int64_t first, int64_t last, double* out) {
  RawWide sums[NUM_MOMENTS] = {};
  alignas(64) float p_buffer[TILE], buffers[4][TILE];
  for (int64_t at = first; at < last; at += TILE) {
    const int count = static_cast<int>(last - at < TILE ? last - at : TILE);
    const float* p = static_cast<const float*>(t.value) + at;
    const float* state[4] = {
        t.momentum + at, t.momentum + numel + at, t.momentum + 2 * numel + at, t.rms + at};
    if (count < TILE || t.value_type != FLOAT32) {
      __builtin_memset(p_buffer, 0, sizeof p_buffer);
      read(p_buffer, t.value, t.value_type, at, count);
      p = p_buffer;
    }
    if (count < TILE) {
      __builtin_memset(buffers, 0, sizeof buffers);
      for (int k = 0; k < 4; ++k) {
        __builtin_memcpy(buffers[k], state[k], 4 * count);
        state[k] = buffers[k];
      }
    }
    for (int o = 0; o < TILE; o += W) {
      add_square(sums[0], load(p + o));
      for (int k = 0; k < 4; ++k) {
        const Vec x = load(state[k] + o);
        RawWide& sum = k < K ? sums[1 + k] : sums[7];
        sum += low_half(x);
        sum += high_half(x);
        add_square(k < K ? sums[4 + k] : sums[8], x);
      }
    }
  }
  for (int s = 0; s < NUM_MOMENTS; ++s) out[s] += total(sums[s]);
}

// --------------------------------------------------------------------------------------------- tiles of B and C

struct Piece {  // `count` elements of one run, from `at` on in the tile
  int64_t local, row, col;
  int at, count;
};

struct Tile {
  int count, pieces;
  int64_t lead;
  Piece piece[TILE];
  // inputs and outputs, TILE each
  const float *g, *p, *m[K], *v, *d[K];
  float *new_m[K], *new_v, *new_d[K], *new_p;
};

struct Buffers {
  alignas(64) float g[TILE], p[TILE], m[K][TILE], v[TILE], d[K][TILE];
};

// Whether the tile can be read and written where it lies.
PYLO_HD bool in_place(const Tile& tile) { return tile.pieces == 1 && tile.count == TILE; }

PYLO_HD void gather(const Tile& tile, const void* from, int64_t type, int64_t offset, float* to) {
  for (int i = 0; i < tile.pieces; ++i) {
    read(to + tile.piece[i].at, from, type, offset + tile.piece[i].local, tile.piece[i].count);
  }
  for (int i = tile.count; i < TILE; ++i) to[i] = 0.0f;
}

PYLO_HD void scatter(const Tile& tile, void* to, int64_t type, int64_t offset, const float* from) {
  for (int i = 0; i < tile.pieces; ++i) {
    write(to, type, offset + tile.piece[i].local, from + tile.piece[i].at, tile.piece[i].count);
  }
}

PYLO_HD void stage(Tile& tile, const Tensors& t, int64_t numel, Buffers& b) {
  const int64_t at = tile.piece[0].local;
  if (in_place(tile)) {
    for (int k = 0; k < K; ++k) {
      tile.m[k] = tile.new_m[k] = t.momentum + k * numel + at;
      if (t.diag) tile.d[k] = tile.new_d[k] = t.diag + k * numel + at;
    }
    tile.v = tile.new_v = t.rms + at;
  } else {
    for (int k = 0; k < K; ++k) {
      gather(tile, t.momentum, FLOAT32, k * numel, b.m[k]);
      tile.m[k] = tile.new_m[k] = b.m[k];
      if (t.diag) {
        gather(tile, t.diag, FLOAT32, k * numel, b.d[k]);
        tile.d[k] = tile.new_d[k] = b.d[k];
      }
    }
    gather(tile, t.rms, FLOAT32, 0, b.v);
    tile.v = tile.new_v = b.v;
  }
  tile.g = static_cast<const float*>(t.grad) + at;
  if (!in_place(tile) || t.grad_type != FLOAT32) {
    gather(tile, t.grad, t.grad_type, 0, b.g);
    tile.g = b.g;
  }
  tile.p = tile.new_p = static_cast<float*>(t.value) + at;
  if (!in_place(tile) || t.value_type != FLOAT32) {
    gather(tile, t.value, t.value_type, 0, b.p);
    tile.p = tile.new_p = b.p;
  }
}

// Write what is not in place yet.
PYLO_HD void unstage(const Tile& tile, const Tensors& t, int64_t numel, bool moves) {
  if (!in_place(tile)) {
    for (int k = 0; k < K; ++k) {
      scatter(tile, t.momentum, FLOAT32, k * numel, tile.new_m[k]);
      if (t.diag) scatter(tile, t.diag, FLOAT32, k * numel, tile.new_d[k]);
    }
    scatter(tile, t.rms, FLOAT32, 0, tile.new_v);
  }
  if (moves && (!in_place(tile) || t.value_type != FLOAT32)) scatter(tile, t.value, t.value_type, 0, tile.new_p);
}

// Goes over a job's elements in tiles of one lead.
struct Cursor {
  int64_t run, at;
};

static bool next_tile(const Box& box, const Job& job, Cursor& cursor, Tile& tile) {
  constexpr int inner = MAX_DIMS - 1;
  tile.count = tile.pieces = 0;
  while (tile.count < TILE && cursor.run < job.last_run) {
    const Run run = run_of(box, cursor.run);
    const int64_t lead = run.lead + cursor.at * box.lead[inner];
    if (tile.count && lead != tile.lead) break;
    tile.lead = lead;
    int64_t count = job.last - cursor.at;
    if (count > TILE - tile.count) count = TILE - tile.count;
    if (box.lead[inner]) count = 1;
    tile.piece[tile.pieces++] = Piece{
        run.local + cursor.at, run.row + cursor.at * box.row[inner], run.col + cursor.at * box.col[inner], tile.count,
        static_cast<int>(count)};
    tile.count += static_cast<int>(count);
    cursor.at += count;
    if (cursor.at == job.last) cursor = Cursor{cursor.run + 1, job.first};
  }
  return tile.count > 0;
}

// One of the two factors of an item.
struct Side {
  const float *factor, *scale, *rsqrt;  // (K, size) each
  int64_t size;
};

PYLO_HD Side side_of(const Factors& f, bool row) {
  return row ? Side{f.row, f.row_scale, f.row_rsqrt, f.rows} : Side{f.col, f.col_scale, f.col_rsqrt, f.cols};
}

// x (K, TILE) of a side's numbers, element by element.
PYLO_HD void fill_side(const Tile& tile, const Box& box, bool row, const float* from, int64_t size, float (*to)[TILE]) {
  constexpr int inner = MAX_DIMS - 1;
  const int64_t stride = row ? box.row[inner] : box.col[inner];
  for (int k = 0; k < K; ++k) {
    for (int i = 0; i < tile.pieces; ++i) {
      const Piece& piece = tile.piece[i];
      const float* at = from + k * size + (row ? piece.row : piece.col);
      for (int j = 0; j < piece.count; ++j) to[k][piece.at + j] = at[j * stride];
    }
    for (int j = tile.count; j < TILE; ++j) to[k][j] = 0.0f;
  }
}

// Where the features of a tile find their factors: the vector side along the tile, the constant side along it too (Dense: one
// number for all). Unused below two dims.
struct Scales {
  const float* vector[K];
  const float* constant[K];
};

template <bool Extended, bool Diag, bool Dense>
PYLO_HD Element<Vec, Extended> features_at(const Tile& tile, int o, float scale, const RuleConstants& rule, const Scales& s) {
  Element<Vec, Extended> e;
  const Vec m[K] = {load(tile.m[0] + o), load(tile.m[1] + o), load(tile.m[2] + o)};
  const Vec g = used_gradient(load(tile.g + o), scale, rule);
  common_features<Extended>(e, g, load(tile.p + o), m, load(tile.v + o), rule);
  if constexpr (Diag) {
    const Vec d[K] = {load(tile.d[0] + o), load(tile.d[1] + o), load(tile.d[2] + o)};
    diag_features<Extended>(e, d, rule);
  } else {
    Vec vector[K], constant[K];
    for (int k = 0; k < K; ++k) {
      vector[k] = load(s.vector[k] + o);
      if constexpr (Dense) {
        constant[k] = splat_<Vec>(*s.constant[k]);
      } else {
        constant[k] = load(s.constant[k] + o);
      }
    }
    factored_features<Extended>(e, vector, constant);
  }
  return e;
}

// ------------------------------------------------------------------------------------------------ pass B

// Sums of squares of the features, in double: so exact that the normalisers' float bits do not depend on the cut.
template <bool Extended, bool Diag>
struct FeatureSums {
  using L = Layout<Extended>;
  static constexpr int NUM = Diag ? L::SUMS_DIAG : L::SUMS_FACTORED;
  RawWide sums[NUM] = {};

  PYLO_HD void add(const Element<Vec, Extended>& e, int count) {
    constexpr int after = Diag ? SIDE : 0;
    for (int f = 0; f < L::ELEMENT; ++f) {
      add_square(sums[f < L::FIRST_FACTOR ? f : f + after], count < W ? first_of(e.x[f], count) : e.x[f]);
    }
    if constexpr (Diag) {
      for (int k = 0; k < K; ++k) {
        const Vec d = e.d[k], q = factor_rsqrt_of(d);
        add_square(sums[L::FIRST_FACTOR + k], count < W ? first_of(d, count) : d);
        add_square(sums[L::FIRST_FACTOR + K + k], count < W ? first_of(q, count) : q);
      }
    }
  }

  template <bool Dense>
  PYLO_HD void add_tile(const Tile& tile, float scale, const RuleConstants& rule, const Scales& scales) {
    FeatureSums own = *this;  // in registers
    int o = 0;
    for (; o + W <= tile.count; o += W) own.add(features_at<Extended, Diag, Dense>(tile, o, scale, rule, scales), W);
    if (o < tile.count) own.add(features_at<Extended, Diag, Dense>(tile, o, scale, rule, scales), tile.count - o);
    *this = own;
  }

  // Adds to out (NUM, leads) and starts anew.
  PYLO_HD void flush(double* out, int64_t leads, int64_t lead) {
    for (int f = 0; f < NUM; ++f) {
      out[f * leads + lead] += total(sums[f]);
      sums[f] = RawWide{};
    }
  }
};

template <bool Extended, bool Diag>
static void features_anywhere(const PassArgs& args, const Job& job, IndexRange leads, double* out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  const float scale = static_cast<float>(args.scale[box.item]);
  const Factors factors = factors_of(item, t, args.factors);
  const Side vector = side_of(factors, item.vector_is_row), constant = side_of(factors, !item.vector_is_row);
  const RuleConstants rule = args.rule;
  Buffers buffers;
  alignas(64) float vector_scale[K][TILE], constant_scale[K][TILE];
  const Scales scales{
      {vector_scale[0], vector_scale[1], vector_scale[2]}, {constant_scale[0], constant_scale[1], constant_scale[2]}};
  FeatureSums<Extended, Diag> sums;
  int64_t lead = -1;
  Tile tile;
  Cursor cursor{job.first_run, job.first};
  while (next_tile(box, job, cursor, tile)) {
    if (lead >= 0 && tile.lead != lead) sums.flush(out, leads.size, lead - leads.first);
    lead = tile.lead;
    stage(tile, t, item.numel, buffers);
    if constexpr (!Diag) {
      fill_side(tile, box, item.vector_is_row, vector.scale, vector.size, vector_scale);
      fill_side(tile, box, !item.vector_is_row, constant.scale, constant.size, constant_scale);
    }
    sums.template add_tile<false>(tile, scale, rule, scales);
  }
  if (lead >= 0) sums.flush(out, leads.size, lead - leads.first);
}

template <bool Extended>
static void features_dense(const PassArgs& args, const Job& job, IndexRange leads, double* out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  const float scale = static_cast<float>(args.scale[box.item]);
  const Factors factors = factors_of(item, t, args.factors);
  const Side vector = side_of(factors, item.vector_is_row), constant = side_of(factors, !item.vector_is_row);
  const RuleConstants rule = args.rule;
  Buffers buffers;
  alignas(64) float padded[K][TILE];
  FeatureSums<Extended, false> sums;
  int64_t lead = -1;
  Tile tile;
  tile.pieces = 1;
  for (int64_t index = job.first_run; index < job.last_run; ++index) {
    const Run run = run_of(box, index);
    if (lead >= 0 && run.lead != lead) sums.flush(out, leads.size, lead - leads.first);
    lead = run.lead;
    const int64_t vector_at = item.vector_is_row ? run.row : run.col, constant_at = item.vector_is_row ? run.col : run.row;
    Scales scales;
    for (int k = 0; k < K; ++k) scales.constant[k] = constant.scale + k * constant.size + constant_at;
    for (int64_t j = job.first; j < job.last; j += TILE) {
      tile.count = static_cast<int>(job.last - j < TILE ? job.last - j : TILE);
      tile.piece[0] = Piece{run.local + j, run.row, run.col, 0, tile.count};
      stage(tile, t, item.numel, buffers);
      for (int k = 0; k < K; ++k) {
        scales.vector[k] = vector.scale + k * vector.size + vector_at + j;
        if (tile.count < TILE) {
          __builtin_memset(padded[k], 0, sizeof padded[k]);
          __builtin_memcpy(padded[k], scales.vector[k], 4 * tile.count);
          scales.vector[k] = padded[k];
        }
      }
      sums.template add_tile<true>(tile, scale, rule, scales);
    }
  }
  if (lead >= 0) sums.flush(out, leads.size, lead - leads.first);
}

template <bool Extended>
static void features_of(const PassArgs& args, const Job& job, IndexRange leads, double* out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  if (is_dense(item, box)) return features_dense<Extended>(args, job, leads, out);
  if (item.factored) return features_anywhere<Extended, false>(args, job, leads, out);
  return features_anywhere<Extended, true>(args, job, leads, out);
}

static void features(const PassArgs& args, const Job& job, bool extended, IndexRange leads, double* out) {
  extended ? features_of<true>(args, job, leads, out) : features_of<false>(args, job, leads, out);
}

// ------------------------------------------------------------------------------------------------ pass C

// A packed network (mlp.h) in the order in which it is read here: weights of the same input beside each other.
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
      for (int e = 0; e < Layout<Extended>::ELEMENT; ++e) element[e][h] = inputs[Layout<Extended>::input_of(e)];
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

// Vectors of a block that are worked on together, so that sums of 4 outputs stay in registers: 16 where there are 32 of them.
constexpr int V = W == 16 ? 4 : 2;
constexpr int OUT = 4;

// sums[j][i] += sum over `count` inputs of x[input][o + i W] weights[input][h + j]
template <int H>
PYLO_HD void add_inputs(Vec (&sums)[OUT][V], int count, const float (*x)[TILE], int o, const float (*weights)[H], int h) {
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

// The network's two outputs for a tile. x: normalised element features; the first layer starts from u + r (see mlp.h), where r has
// one number per hidden unit.
template <bool Extended, int H>
PYLO_HD void outputs_of(
    const Network<Extended, H>& net, const float (*x)[TILE], const float (*u)[TILE], const float* r, float (*out)[TILE]) {
  alignas(64) float first[H][TILE];
  for (int o = 0; o < TILE; o += V * W) {
    for (int h = 0; h < H; h += OUT) {
      Vec sums[OUT][V];
#pragma GCC unroll 4
      for (int j = 0; j < OUT; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) sums[j][i] = load(u[h + j] + o + i * W) + splat_<Vec>(r[h + j]);
      }
      add_inputs<H>(sums, Layout<Extended>::ELEMENT, x, o, net.element, h);
#pragma GCC unroll 4
      for (int j = 0; j < OUT; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) store(first[h + j] + o + i * W, relu_(sums[j][i]));
      }
    }
    Vec o0[V], o1[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      o0[i] = splat_<Vec>(net.output_bias[0]);
      o1[i] = splat_<Vec>(net.output_bias[1]);
    }
    for (int h = 0; h < H; h += OUT) {
      Vec sums[OUT][V];
#pragma GCC unroll 4
      for (int j = 0; j < OUT; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) sums[j][i] = splat_<Vec>(net.hidden_bias[h + j]);
      }
      add_inputs<H>(sums, H, first, o, net.hidden, h);
#pragma GCC unroll 4
      for (int j = 0; j < OUT; ++j) {
        const Vec w0 = splat_<Vec>(net.output[0][h + j]), w1 = splat_<Vec>(net.output[1][h + j]);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          const Vec hidden = relu_(sums[j][i]);
          o0[i] = fma_(hidden, w0, o0[i]);
          o1[i] = fma_(hidden, w1, o1[i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      store(out[0] + o + i * W, o0[i]);
      store(out[1] + o + i * W, o1[i]);
    }
  }
}

// u or r along a tile: a chain from `start` over a side's normalised features.
template <int H>
PYLO_HD void side_layer(const float* bias, const float (*side)[TILE], const float (*weights)[H], float (*out)[TILE]) {
  for (int h = 0; h < H; ++h) {
    for (int o = 0; o < TILE; o += W) {
      Vec sum = splat_<Vec>(bias ? bias[h] : 0.0f);
#pragma GCC unroll 6
      for (int s = 0; s < SIDE; ++s) sum = fma_(load(side[s] + o), splat_<Vec>(weights[s][h]), sum);
      store(out[h] + o, sum);
    }
  }
}

// Everything pass C needs of a job's item.
template <bool Extended, int H>
struct Updater {
  using L = Layout<Extended>;
  const Box& box;
  const Item& item;
  const Tensors& t;
  const RuleConstants rule;
  const Step step;
  const float scale;
  const float* normalisers;
  const Network<Extended, H> net;
  RawWide squares{};
  Buffers buffers;
  alignas(64) float x[L::ELEMENT][TILE];
  alignas(64) float out[2][TILE];

  Updater(const PassArgs& args, const Job& job)
      : box(args.boxes[job.box]),
        item(args.items[box.item]),
        t(args.tensors[box.item]),
        rule(args.rule),
        step(args.steps[box.item]),
        scale(static_cast<float>(args.scale[box.item])),
        normalisers(args.normalisers + args.normalisers_at[box.item]),
        net(args.networks + args.network_of[box.item] * args.network_size, item.vector_is_row) {}

  // The normaliser of a side's feature.
  PYLO_HD float side_normaliser(const float* norm, bool vector, int s) const {
    return norm[side_input<Extended>(vector == static_cast<bool>(item.vector_is_row), s)];
  }

  // New accumulators, and the normalised element features to x.
  template <bool Diag, bool Dense>
  PYLO_HD void fill(const Tile& tile, const Scales& scales, const float* norm) {
    const RuleConstants constants = rule;
    for (int o = 0; o < TILE; o += W) {
      const Element<Vec, Extended> e = features_at<Extended, Diag, Dense>(tile, o, scale, constants, scales);
      for (int k = 0; k < K; ++k) {
        store(tile.new_m[k] + o, e.m[k]);
        if constexpr (Diag) store(tile.new_d[k] + o, e.d[k]);
      }
      store(tile.new_v + o, e.v);
      for (int f = 0; f < L::ELEMENT; ++f) store(x[f] + o, e.x[f] * norm[L::input_of(f)]);
    }
  }

  // From the network's outputs to the new values, or the direction.
  PYLO_HD void finish(const Tile& tile) {
    if (t.direction) {
      alignas(64) float s[TILE];
      for (int o = 0; o < TILE; o += W) {
        store(s + o, direction_of(load(out[0] + o), load(out[1] + o), step.exp_mult) * step.step_size);
      }
      scatter(tile, t.direction, FLOAT32, 0, s);
    } else {
      RawWide sum = squares;
      for (int o = 0; o < TILE; o += W) {
        const Vec p = load(tile.p + o);
        const Vec now = moved(p, direction_of(load(out[0] + o), load(out[1] + o), step.exp_mult), step);
        const int count = tile.count - o;
        if (count > 0) add_square(sum, count < W ? first_of(now - p, count) : now - p);
        store(tile.new_p + o, now);
      }
      squares = sum;
    }
    unstage(tile, t, item.numel, !t.direction);
  }

  // Tiles side by side whose u is kept for the next rows: as much as the caches have room for. A small network reads memory row by
  // row then; a large one has time to fetch the row below, see `prefetch`.
  static constexpr int BLOCK = H == 32 ? 1 : 32;

  // Fetch the inputs of a tile that is worked on later.
  PYLO_HD void prefetch(int64_t at) const {
    constexpr int line = 16;  // floats
    for (int i = 0; i < TILE; i += line) {
      for (int k = 0; k < K; ++k) __builtin_prefetch(t.momentum + k * item.numel + at + i, 1);
      __builtin_prefetch(t.rms + at + i, 1);
      if (t.value_type == FLOAT32) __builtin_prefetch(static_cast<float*>(t.value) + at + i, 1);
      if (t.grad_type == FLOAT32) __builtin_prefetch(static_cast<const float*>(t.grad) + at + i);
    }
  }

  void dense(const PassArgs& args, const Job& job) {
    const Factors factors = factors_of(item, t, args.factors);
    const Side vector = side_of(factors, item.vector_is_row), constant = side_of(factors, !item.vector_is_row);
    alignas(64) float u[BLOCK][H][TILE], side[SIDE][TILE], padded[K][TILE];
    alignas(64) float r[ROWS][H];
    Run runs[ROWS];
    Tile tile;
    tile.pieces = 1;
    for (int64_t first_run = job.first_run; first_run < job.last_run;) {
      int rows = 0;
      for (; rows < ROWS && first_run + rows < job.last_run; ++rows) {
        runs[rows] = run_of(box, first_run + rows);
        const bool same = item.vector_is_row ? runs[rows].row == runs[0].row : runs[rows].col == runs[0].col;
        if (!same || runs[rows].lead != runs[0].lead) break;
      }
      const float* norm = normalisers + runs[0].lead * L::INPUTS;
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
            const float* from = (s < K ? vector.factor : vector.rsqrt) + s % K * vector.size + vector_at + j;
            const float by = side_normaliser(norm, true, s);
            for (int i = 0; i < count; ++i) side[s][i] = from[i] * by;
            for (int i = count; i < TILE; ++i) side[s][i] = 0.0f;
          }
          side_layer<H>(net.input_bias, side, net.vector, u[(j - block) / TILE]);
        }
        for (int i = 0; i < rows; ++i) {
          const int64_t constant_at = item.vector_is_row ? runs[i].col : runs[i].row;
          Scales scales;
          for (int k = 0; k < K; ++k) scales.constant[k] = constant.scale + k * constant.size + constant_at;
          for (int64_t j = block; j < end; j += TILE) {
            tile.count = static_cast<int>(end - j < TILE ? end - j : TILE);
            for (int k = 0; k < K; ++k) {
              scales.vector[k] = vector.scale + k * vector.size + vector_at + j;
              if (tile.count < TILE) {
                __builtin_memset(padded[k], 0, sizeof padded[k]);
                __builtin_memcpy(padded[k], scales.vector[k], 4 * tile.count);
                scales.vector[k] = padded[k];
              }
            }
            if (BLOCK == 1 && i + 1 < rows) prefetch(runs[i + 1].local + j);
            if (BLOCK == 1 && i + 1 == rows && end < job.last) prefetch(runs[0].local + end);
            tile.piece[0] = Piece{runs[i].local + j, runs[i].row, runs[i].col, 0, tile.count};
            stage(tile, t, item.numel, buffers);
            fill<false, true>(tile, scales, norm);
            outputs_of<Extended, H>(net, x, u[(j - block) / TILE], r[i], out);
            finish(tile);
          }
        }
      }
      first_run += rows;
    }
  }

  template <bool Diag>
  void anywhere(const PassArgs& args, const Job& job) {
    const Factors factors = factors_of(item, t, args.factors);
    const Side vector = side_of(factors, item.vector_is_row), constant = side_of(factors, !item.vector_is_row);
    alignas(64) float vector_scale[K][TILE], constant_scale[K][TILE];
    alignas(64) float vector_side[SIDE][TILE], constant_side[SIDE][TILE], u[H][TILE], r[H][TILE];
    const float zeros[H] = {};
    const Scales scales{
        {vector_scale[0], vector_scale[1], vector_scale[2]}, {constant_scale[0], constant_scale[1], constant_scale[2]}};
    Tile tile;
    Cursor cursor{job.first_run, job.first};
    while (next_tile(box, job, cursor, tile)) {
      const float* norm = normalisers + tile.lead * L::INPUTS;
      stage(tile, t, item.numel, buffers);
      if constexpr (!Diag) {
        fill_side(tile, box, item.vector_is_row, vector.scale, vector.size, vector_scale);
        fill_side(tile, box, !item.vector_is_row, constant.scale, constant.size, constant_scale);
        fill_side(tile, box, item.vector_is_row, vector.factor, vector.size, vector_side);
        fill_side(tile, box, item.vector_is_row, vector.rsqrt, vector.size, vector_side + K);
        fill_side(tile, box, !item.vector_is_row, constant.factor, constant.size, constant_side);
        fill_side(tile, box, !item.vector_is_row, constant.rsqrt, constant.size, constant_side + K);
      }
      fill<Diag, false>(tile, scales, norm);
      for (int s = 0; s < SIDE; ++s) {
        const float vector_norm = side_normaliser(norm, true, s), constant_norm = side_normaliser(norm, false, s);
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
      side_layer<H>(net.input_bias, vector_side, net.vector, u);
      side_layer<H>(nullptr, constant_side, net.constant, r);
      for (int h = 0; h < H; ++h) {
        for (int o = 0; o < TILE; o += W) store(u[h] + o, load(u[h] + o) + load(r[h] + o));
      }
      outputs_of<Extended, H>(net, x, u, zeros, out);
      finish(tile);
    }
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
