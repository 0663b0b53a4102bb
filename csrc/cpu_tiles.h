// Elements are worked on in tiles of TILE, a structure of arrays. A tile's inputs are read in place
// where they are 64 contiguous floats, else they are copied to a buffer whose pads are zero: there
// is one sequence of instructions for an element, wherever it lies. `Dense` boxes have long runs
// along which one factor changes (the vector side) and the other does not (the constant side); all
// others, and tensors below two dims, have both sides filled in element by element.
#pragma once

#include "cpu.h"
#include "cpu_dtypes.h"
#include "vector.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

constexpr int TILE = 64;
constexpr int DENSE_RUN = 32;  // shortest run that is worth it

PYLO_HD bool is_dense(const Item& item, const Box& box) {
  const int64_t inner = MAX_DIMS - 1;
  const int64_t vector = item.vector_is_row ? box.row[inner] : box.col[inner];
  const int64_t constant = item.vector_is_row ? box.col[inner] : box.row[inner];
  return item.factored && box.sizes[inner] >= DENSE_RUN && vector == 1 && constant == 0 &&
         box.lead[inner] == 0;
}

struct Piece {  // `count` elements of one run, from `at` on in the tile
  int64_t local, row, col;
  int at, count;
};

struct Tile {
  int count, pieces;
  int64_t later = 0;  // how far from here memory is asked for, in elements; 0: elsewhere
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

// A vector of bfloat16 numbers as floats, and back, rounded with random bits.
PYLO_HD Vec load_bfloat(const uint16_t* at) {
  RawHalf half;
  __builtin_memcpy(&half, at, sizeof half);
  return {(RawVec)(__builtin_convertvector(half, RawUint) << 16)};
}

PYLO_HD void store_rounded(uint16_t* at, Vec x, RawUint random) {
  const RawHalf half = __builtin_convertvector(round_to_bfloat16((RawUint)x.raw, random), RawHalf);
  __builtin_memcpy(at, &half, sizeof half);
}

// Means that are floats, where they lie.
PYLO_HD void point_to_means(Tile& tile, const Tensors& t, int64_t numel, int64_t at) {
  for (int k = 0; k < K; ++k) {
    tile.m[k] = tile.new_m[k] = t.momentum + k * numel + at;
    if (t.diag) tile.d[k] = tile.new_d[k] = t.diag + k * numel + at;
  }
  tile.v = tile.new_v = t.rms + at;
}

// Whether values, gradients and means are all float32: then any number of whole vectors can be read
// and written where they lie, without staging.
PYLO_HD bool all_floats(const Tensors& t, int64_t state_type) {
  return state_type == FLOAT32 && t.grad_type == FLOAT32 && t.value_type == FLOAT32;
}

// A tile of whole vectors of these, however many, from `at` on.
PYLO_HD void point(Tile& tile, const Tensors& t, int64_t numel, int64_t at) {
  point_to_means(tile, t, numel, at);
  tile.g = static_cast<const float*>(t.grad) + at;
  tile.p = tile.new_p = static_cast<float*>(t.value) + at;
}

PYLO_HD void stage(Tile& tile, const Tensors& t, int64_t state_type, int64_t numel, Buffers& b) {
  const int64_t at = tile.piece[0].local;
  if (in_place(tile) && state_type == FLOAT32) {
    point_to_means(tile, t, numel, at);
  } else if (in_place(tile)) {
    const uint16_t *m = reinterpret_cast<const uint16_t*>(t.momentum) + at,
                   *v = reinterpret_cast<const uint16_t*>(t.rms) + at;
    for (int o = 0; o < TILE; o += W) {
      for (int k = 0; k < K; ++k) store(b.m[k] + o, load_bfloat(m + k * numel + o));
      store(b.v + o, load_bfloat(v + o));
    }
    for (int k = 0; k < K; ++k) {
      tile.m[k] = tile.new_m[k] = b.m[k];
      if (t.diag) tile.d[k] = tile.new_d[k] = t.diag + k * numel + at;
    }
    tile.v = tile.new_v = b.v;
  } else {
    for (int k = 0; k < K; ++k) {
      gather(tile, t.momentum, state_type, k * numel, b.m[k]);
      tile.m[k] = tile.new_m[k] = b.m[k];
      if (t.diag) {
        gather(tile, t.diag, FLOAT32, k * numel, b.d[k]);
        tile.d[k] = tile.new_d[k] = b.d[k];
      }
    }
    gather(tile, t.rms, state_type, 0, b.v);
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

// How far ahead of the elements in work memory is asked for, in elements: the machine itself does
// not look beyond a page.
constexpr int64_t AHEAD = 512;

// Fetch the inputs of a tile that is worked on later.
PYLO_HD void prefetch(const Tensors& t, int64_t state_type, int64_t numel, int64_t at) {
  constexpr int line = 16;  // floats
  if (state_type != FLOAT32) {
    const uint16_t *m = reinterpret_cast<const uint16_t*>(t.momentum) + at,
                   *v = reinterpret_cast<const uint16_t*>(t.rms) + at;
    for (int i = 0; i < TILE; i += 2 * line) {
      for (int k = 0; k < K; ++k) __builtin_prefetch(m + k * numel + i);
      __builtin_prefetch(v + i);
    }
  }
  for (int i = 0; i < TILE; i += line) {
    if (state_type == FLOAT32) {
      for (int k = 0; k < K; ++k) __builtin_prefetch(t.momentum + k * numel + at + i);
      __builtin_prefetch(t.rms + at + i);
    }
    if (t.value_type == FLOAT32) __builtin_prefetch(static_cast<float*>(t.value) + at + i);
    if (t.grad_type == FLOAT32) __builtin_prefetch(static_cast<const float*>(t.grad) + at + i);
  }
}

PYLO_HD void prefetch_later(const Tile& tile, int o) {
  const int64_t at = o + tile.later;
  __builtin_prefetch(tile.g + at);
  __builtin_prefetch(tile.p + at);
  __builtin_prefetch(tile.v + at);
  for (int k = 0; k < K; ++k) __builtin_prefetch(tile.m[k] + at);
}

// The random words of a tile, for the pairs of slots.
PYLO_HD void words_of(const Tile& tile, const Item& item, uint32_t key,
                      uint32_t (&words)[2][TILE]) {
  if (in_place(tile) && neighbours(item, tile.piece[0].local, TILE)) {
    const int64_t first = global_index(item, tile.piece[0].local);
    for (uint32_t pair = 0; pair < 2; ++pair) {
      const uint32_t start = static_cast<uint32_t>(first) + key_of(key, pair, first);
      for (int o = 0; o < TILE; o += W) {
        const RawUint word = mix(counting() + (start + static_cast<uint32_t>(o)));
        __builtin_memcpy(words[pair] + o, &word, sizeof word);
      }
    }
    return;
  }
  Words of(key);
  for (int i = 0; i < tile.pieces; ++i) {
    const Piece& piece = tile.piece[i];
    for (int j = 0; j < piece.count; ++j) {
      uint32_t of_one[2];
      of.get(global_index(item, piece.local + j), of_one);
      for (int pair = 0; pair < 2; ++pair) words[pair][piece.at + j] = of_one[pair];
    }
  }
}

// Write momentum and rms in bfloat16.
PYLO_HD void round_state(const Tile& tile, const Tensors& t, const Item& item, uint32_t key) {
  const float* const from[K + 1] = {tile.new_m[0], tile.new_m[1], tile.new_m[2], tile.new_v};
  uint16_t *m = reinterpret_cast<uint16_t*>(t.momentum), *v = reinterpret_cast<uint16_t*>(t.rms);
  uint16_t* const to[K + 1] = {m, m + item.numel, m + 2 * item.numel, v};
  alignas(64) uint32_t words[2][TILE];
  words_of(tile, item, key, words);
  for (int s = 0; s <= K; ++s) {
    for (int i = 0; i < tile.pieces; ++i) {
      const Piece& piece = tile.piece[i];
      uint16_t* const at = to[s] + piece.local;
      const int whole = piece.count / W * W;
      for (int o = 0; o < whole; o += W) {
        RawUint word;
        __builtin_memcpy(&word, words[s / 2] + piece.at + o, sizeof word);
        store_rounded(at + o, load(from[s] + piece.at + o), random_of(word, s));
      }
      for (int o = whole; o < piece.count; ++o) {
        const uint32_t random = random_of(words[s / 2][piece.at + o], s);
        at[o] = static_cast<uint16_t>(round_to_bfloat16(to_bits(from[s][piece.at + o]), random));
      }
    }
  }
}

// Write what is not in place yet.
PYLO_HD void unstage(const Tile& tile, const Tensors& t, const PassArgs& args, int64_t i,
                     bool moves) {
  const Item& item = args.items[i];
  const int64_t numel = item.numel;
  const bool halved = args.state_type != FLOAT32;
  if (halved) round_state(tile, t, item, static_cast<uint32_t>(args.keys[i]));
  if (!in_place(tile)) {
    for (int k = 0; k < K; ++k) {
      if (!halved) scatter(tile, t.momentum, FLOAT32, k * numel, tile.new_m[k]);
      if (t.diag) scatter(tile, t.diag, FLOAT32, k * numel, tile.new_d[k]);
    }
    if (!halved) scatter(tile, t.rms, FLOAT32, 0, tile.new_v);
  }
  if (moves && (!in_place(tile) || t.value_type != FLOAT32))
    scatter(tile, t.value, t.value_type, 0, tile.new_p);
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
    tile.piece[tile.pieces++] =
        Piece{run.local + cursor.at, run.row + cursor.at * box.row[inner],
              run.col + cursor.at * box.col[inner], tile.count, static_cast<int>(count)};
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
  return row ? Side{f.row, f.row_scale, f.row_rsqrt, f.rows}
             : Side{f.col, f.col_scale, f.col_rsqrt, f.cols};
}

// x (K, TILE) of a side's numbers, element by element.
PYLO_HD void fill_side(const Tile& tile, const Box& box, bool row, const float* from, int64_t size,
                       float (*to)[TILE]) {
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

// Where the features of a tile find their factors: the vector side along the tile, the constant
// side along it too (Dense: one number for all). Unused below two dims.
struct Scales {
  const float* vector[K];
  const float* constant[K];
};

// The vector side's scales from `at` on: in place, or where they end within the tile with zeros
// after them, in `padded`.
PYLO_HD void vector_scales(Scales& scales, const Side& vector, int64_t at, int count,
                           float (&padded)[K][TILE]) {
  for (int k = 0; k < K; ++k) {
    scales.vector[k] = vector.scale + k * vector.size + at;
    if (count < TILE) {
      __builtin_memset(padded[k], 0, sizeof padded[k]);
      __builtin_memcpy(padded[k], scales.vector[k], 4 * count);
      scales.vector[k] = padded[k];
    }
  }
}

constexpr int ROWS = 16;  // runs that share what depends on the vector side alone

// The runs of a job of dense boxes from `first` on that have the same vector side and lead, at most
// ROWS; gives their number.
PYLO_HD int runs_alike(const Item& item, const Box& box, const Job& job, int64_t first,
                       Run (&runs)[ROWS]) {
  int count = 0;
  for (; count < ROWS && first + count < job.last_run; ++count) {
    const Run run = run_of(box, first + count);
    runs[count] = run;
    const bool same = item.vector_is_row ? run.row == runs[0].row : run.col == runs[0].col;
    if (!same || run.lead != runs[0].lead) break;
  }
  return count;
}

// Calls work(tile, scales) for all tiles of a job of any box, in order. The arrays that both point
// to are its own or where the data lies.
template <bool Diag, class Work>
PYLO_HD void for_tiles(const PassArgs& args, const Job& job, const Work& work) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  const Factors factors = factors_of(item, t, args.factors);
  const Side vector = side_of(factors, item.vector_is_row),
             constant = side_of(factors, !item.vector_is_row);
  Buffers buffers;
  alignas(64) float vector_scale[K][TILE], constant_scale[K][TILE];
  const Scales scales{{vector_scale[0], vector_scale[1], vector_scale[2]},
                      {constant_scale[0], constant_scale[1], constant_scale[2]}};
  Tile tile;
  Cursor cursor{job.first_run, job.first};
  while (next_tile(box, job, cursor, tile)) {
    stage(tile, t, args.state_type, item.numel, buffers);
    if constexpr (!Diag) {
      fill_side(tile, box, item.vector_is_row, vector.scale, vector.size, vector_scale);
      fill_side(tile, box, !item.vector_is_row, constant.scale, constant.size, constant_scale);
    }
    work(tile, scales);
  }
}

// An element's new accumulators and the features that need no factor.
template <bool Extended>
PYLO_HD Element<Vec, Extended> common_at(const Tile& tile, int o, float scale,
                                         const RuleConstants& rule) {
  Element<Vec, Extended> e;
  const Vec m[K] = {load(tile.m[0] + o), load(tile.m[1] + o), load(tile.m[2] + o)};
  const Vec g = used_gradient(load(tile.g + o), scale, rule);
  common_features<Extended>(e, g, load(tile.p + o), m, load(tile.v + o), rule);
  return e;
}

template <bool Extended, bool Diag, bool Dense>
PYLO_HD Element<Vec, Extended> features_at(const Tile& tile, int o, float scale,
                                           const RuleConstants& rule, const Scales& s) {
  Element<Vec, Extended> e = common_at<Extended>(tile, o, scale, rule);
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

}  // namespace PYLO_ISA
}  // namespace pylo_dist
