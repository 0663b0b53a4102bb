// How the work of a batch is dealt to the blocks of a GPU: tables that follow from the shapes
// alone, made on the host once per batch and kept in the workspace on the device. No torch, no CUDA
// include.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "pylo_dist/geometry.h"

namespace pylo_dist {
namespace gpu {

constexpr int INNER = MAX_DIMS - 1;

// Runs first_run .. last_run of a box, and of each the elements first .. last. Jobs of one box and
// one lead follow each other: the first of them says where they end (group_end), the others have 0.
struct Job {
  int64_t box, first_run, last_run, first, last, lead, group_end;
};

// Sums along the dim of a box that one of its factors lacks. An output is an index of the other
// dims, in C order; `chunk` of `along` elements belong to a job. Of BOTH sides at once, a tile: the
// columns first .. last of a run, `chunk` of the dim that the other side lacks, `outer` of the dims
// that are left.
struct SideJob {
  int64_t box, side, first, last, chunk, outer;
};

enum Side : int64_t { ROW = 0, COLUMN = 1, NEITHER = 2, BOTH = 3 };

// Entries first .. last of a factor of an item, or (NEITHER) its audit.
struct EntryJob {
  int64_t item, side, first, last;
};

// What is made of an item's factors once all their entries are new: the scales of entries of a row
// vector with one mean over all, those of whole groups with a mean each, the squares of leads.
struct FactorJob {
  int64_t item, what, first, last;
};

enum FactorWork : int64_t { ENTRY_SCALES = 0, GROUP_SCALES = 1, LEAD_SQUARES = 2 };

// Leads first .. last of an item whose matrices are so small that a thread sums one.
struct LeadJob {
  int64_t item, first, last;
};

// What a pass is told about an item: pointers, and value_type | grad_type << 2 | active << 4.
// Momentum and rms are of the type that a kernel is made for.
struct Live {
  void* value;
  const void* grad;
  void *momentum, *rms;
  float *row_or_diag, *col, *direction;
  double *a, *b;  // the item's buffers of the two Sums
  int64_t types;
};

// Ranges of an item in the tables.
struct ItemRange {
  int64_t first_job, last_job, first_side_job, last_side_job, first_entry_job, last_entry_job,
      factor_jobs;
};

#if defined(PYLO_SMALL_JOBS)  // for tests: small tensors then have many jobs and sums of many parts
constexpr int64_t JOB = 900, COLUMNS = 64, ALONG = 8, WARP_ALONG = 70, MOMENT_JOB = 700,
                  SMALL_LEAD = 50, TILE_ROWS = 20, ENTRIES = 96, LARGE_GROUP = 30;
#else
constexpr int64_t JOB = 16384;         // elements
constexpr int64_t COLUMNS = 128;       // of a job with more than one run
constexpr int64_t ALONG = 128;         // elements of a sum in a job whose outputs lie side by side
constexpr int64_t WARP_ALONG = 4096;   // elements of a sum in a job whose sums go along runs
constexpr int64_t MOMENT_JOB = 32768;  // elements
constexpr int64_t SMALL_LEAD = 1024;   // largest matrix that one thread sums
constexpr int64_t TILE_ROWS = 128;     // elements of a column in a tile
constexpr int64_t ENTRIES = 256;       // of a factor in a job
constexpr int64_t LARGE_GROUP = 2048;  // entries of a row vector that are worth a block
#endif
constexpr int64_t OUTPUTS = 256, WARP_OUTPUTS = 64;  // of those two kinds of job
constexpr int64_t GROUPS = 8, LEADS = 32;            // in a job, of those that a warp sums
constexpr int FACTOR_SUMS = 3 * K;                   // of a factor's entries
constexpr int64_t LONG_RUN = 16;                     // shortest run that is worth whole products
constexpr int MOST_RUNS = 128;                       // of a job whose runs are long
constexpr int MOST_SUMS = 32;                        // of pass B, with moments
constexpr int TILE_COLUMNS = 128;                    // four a lane
constexpr int64_t LEAST_TILE_ROWS = 4, LEAST_TILE_COLUMNS = 32;

// The dim of a box along which a side is summed; -1 where the box is one element long there.
PYLO_HD int summed_dim(const Box& box, int64_t side) {
  if (side == NEITHER) return INNER;
  const int64_t* strides = side == ROW ? box.row : box.col;
  for (int d = 0; d < MAX_DIMS; ++d) {
    if (box.sizes[d] > 1 && strides[d] == 0) return d;
  }
  return -1;
}

PYLO_HD int64_t box_numel(const Box& box) { return num_runs(box) * box.sizes[INNER]; }

PYLO_HD int64_t along(const Box& box, int dim) { return dim < 0 ? 1 : box.sizes[dim]; }

// Where one factor lacks the innermost dim and the other another one, both sides are summed in one
// reading, tile by tile. Gives that other dim; -1 for a box that is not read so.
PYLO_HD int tiled_dim(const Box& box) {
  const int row = summed_dim(box, ROW), col = summed_dim(box, COLUMN),
            other = row == INNER ? col : row;
  const bool tiled = (row == INNER) != (col == INNER) && other >= 0 &&
                     box.sizes[INNER] >= LEAST_TILE_COLUMNS && along(box, other) >= LEAST_TILE_ROWS;
  return tiled ? other : -1;
}

PYLO_HD int64_t chunk_length(const Box& box, int dim) {
  if (tiled_dim(box) >= 0) return dim == INNER ? TILE_COLUMNS : TILE_ROWS;
  return dim == INNER ? WARP_ALONG : ALONG;
}

PYLO_HD int64_t num_chunks(const Box& box, int dim) {
  const int64_t length = chunk_length(box, dim);
  return (along(box, dim) + length - 1) / length;
}

// run_of, quick for boxes of which one or two dims matter.
PYLO_HD Run find_run(const Box& box, int64_t index) {
  Run run{box.local_at, box.row_at, box.col_at, box.lead_at};
  for (int d = INNER - 1; d >= 0 && index > 0; --d) {
    if (box.sizes[d] == 1) continue;
    int64_t j = index;
    index = index < box.sizes[d] ? 0 : divide(index, box.sizes[d], j);
    run.local += j * box.local[d];
    run.row += j * box.row[d];
    run.col += j * box.col[d];
    run.lead += j * box.lead[d];
  }
  return run;
}

// Where output `index` of a side begins in local memory.
PYLO_HD int64_t output_at(const Box& box, int dim, int64_t index) {
  int64_t at = box.local_at;
  for (int d = INNER; d >= 0 && index > 0; --d) {
    if (d == dim || box.sizes[d] == 1) continue;
    int64_t j = index;
    index = index < box.sizes[d] ? 0 : divide(index, box.sizes[d], j);
    at += j * box.local[d];
  }
  return at;
}

// The output of a side that is entry `entry` of its factor; -1 if the box has none.
PYLO_HD int64_t output_of_entry(const Box& box, int64_t side, int dim, int64_t entry) {
  const int64_t* strides = side == ROW ? box.row : box.col;
  int64_t rest = entry - (side == ROW ? box.row_at : box.col_at), output = 0;
  if (rest < 0) return -1;
  for (int d = 0; d < MAX_DIMS; ++d) {
    if (d == dim || box.sizes[d] == 1) continue;
    const int64_t j = rest / strides[d];
    if (j >= box.sizes[d]) return -1;
    rest -= j * strides[d];
    output = output * box.sizes[d] + j;
  }
  return rest == 0 ? output : -1;
}

// Whether a warp of the tensor-core path takes this box: long runs along which one factor changes
// and the other does not.
PYLO_HD bool has_long_runs(const Item& item, const Box& box) {
  return item.factored && box.sizes[INNER] >= LONG_RUN &&
         (box.row[INNER] == 0) != (box.col[INNER] == 0) && box.lead[INNER] == 0;
}

PYLO_HD bool has_small_leads(const Item& item) {
  return item.leads > 1 && item.lead_numel <= SMALL_LEAD;
}

// Everything of a batch that is known before its first step. Offsets are bytes into the workspace
// on the device.
struct Plan {
  int64_t magic;
  int64_t num_items, num_boxes, num_jobs, num_side_jobs, num_entry_jobs, num_lead_jobs,
      num_factor_jobs, num_moment_jobs, num_leads;
  int64_t live, words, first_moment_job, counters, moment_partials, items, boxes, jobs, side_jobs,
      side_at, entry_jobs, factor_jobs, lead_jobs, ranges, normalisers_at;
  int64_t normalisers, networks, partials, total;
};
constexpr int64_t PLAN_MAGIC = 0x70796c6f31;
// Rows of `Live` are kept for each of these apart, since they read different tensors, and once more
// for a stream that is being captured: a graph brings its own rows whenever it runs, and eager
// steps must not take those for theirs.
enum Pass : int64_t { GRADIENTS = 0, MOMENTS = 1, FEATURES = 2, UPDATES = 3, PASSES = 4 };
// of a word: pointer and types of a gradient
constexpr int64_t GRAD_SHIFT = 56;
constexpr int64_t GRAD_BITS = (int64_t{1} << GRAD_SHIFT) - 1;
constexpr int64_t MOST_INPUTS = 30;
constexpr int64_t NETWORK_WORDS = 128 * 32;  // of one network as the lanes of a warp keep it

// Of every item: its jobs that are done in passes B and C, in the moments, among those of factors.
// Last, the turns that blocks of `factor_kernel` have taken.
inline int64_t num_counters(int64_t num_items) { return 3 * num_items + 1; }

struct Work {
  Plan plan{};
  std::vector<Job> jobs;
  std::vector<SideJob> side_jobs;
  std::vector<EntryJob> entry_jobs;
  std::vector<FactorJob> factor_jobs;
  std::vector<LeadJob> lead_jobs;
  std::vector<int64_t> side_at;  // two per box: where the partial sums of its sides are
  std::vector<ItemRange> ranges;
  std::vector<int64_t> normalisers_at;
  std::vector<int64_t> first_moment_job;  // of every item, and one more
};

inline int64_t num_moment_jobs(const Item& item) {
  return (item.numel + MOMENT_JOB - 1) / MOMENT_JOB;
}

// What follows once the entries of an item's factors are new.
inline void deal_factors(const Item& item, int64_t i, std::vector<FactorJob>& jobs) {
  const auto cut = [&](int64_t what, int64_t size, int64_t most) {
    for (int64_t at = 0; at < size; at += most)
      jobs.push_back(FactorJob{i, what, at, std::min(size, at + most)});
  };
  const int64_t groups = item.row_outer * item.row_inner;
  if (groups == 1)
    cut(ENTRY_SCALES, item.rows, ENTRIES);
  else
    cut(GROUP_SCALES, groups, item.size_d1 > LARGE_GROUP ? 1 : GROUPS);
  cut(LEAD_SQUARES, item.leads, LEADS);
}

inline int64_t take(Plan& plan, int64_t bytes) {
  const int64_t here = plan.total;
  plan.total += (bytes + 255) / 256 * 256;
  return here;
}

inline Work deal(const Item* items, int64_t num_items, const Box* boxes, int64_t num_boxes) {
  Work w;
  int64_t side_partials = 0, leads = 0, moment_jobs = 0;
  w.side_at.resize(2 * num_boxes, 0);
  w.normalisers_at.resize(num_items, 0);
  for (int64_t i = 0; i < num_items; ++i) {
    const Item& item = items[i];
    ItemRange range{};
    range.first_job = static_cast<int64_t>(w.jobs.size());
    range.first_side_job = static_cast<int64_t>(w.side_jobs.size());
    for (int64_t b = item.first_box; b < item.first_box + item.num_boxes; ++b) {
      const Box& box = boxes[b];
      const int64_t runs = num_runs(box), inner = box.sizes[INNER];
      if (runs * inner == 0) continue;
      // jobs of at most JOB elements, of one lead each unless leads are summed by threads
      const bool one_run = runs == 1 && !has_long_runs(item, box);
      int64_t most_columns = std::min(inner, one_run ? JOB : COLUMNS);
      int64_t together = runs;
      if (item.leads > 1 && !has_small_leads(item)) {
        together = 1;
        if (box.lead[INNER] != 0) most_columns = 1;
        for (int d = INNER - 1; d >= 0 && (box.lead[d] == 0 || box.sizes[d] == 1); --d)
          together *= box.sizes[d];
      }
      const int64_t room =
          has_long_runs(item, box) ? std::min<int64_t>(together, MOST_RUNS) : together;
      const int64_t most_runs = std::max<int64_t>(1, std::min(room, JOB / most_columns));
      for (int64_t begin = 0; begin < runs; begin += together) {
        const size_t group = w.jobs.size();
        for (int64_t run = begin; run < begin + together; run += most_runs) {
          const int64_t last_run = std::min(begin + together, run + most_runs);
          for (int64_t at = 0; at < inner; at += most_columns) {
            const int64_t lead = run_of(box, begin).lead + at * box.lead[INNER];
            w.jobs.push_back(
                Job{b, run, last_run, at, std::min(inner, at + most_columns), lead, 0});
          }
        }
        size_t first = group;  // columns of a lead each are groups of their own
        for (size_t j = group; j < w.jobs.size(); ++j) {
          if (w.jobs[j].lead != w.jobs[first].lead) first = j;
          w.jobs[first].group_end = static_cast<int64_t>(j + 1);
        }
      }
      for (int64_t side = item.factored ? ROW : NEITHER; side <= (item.factored ? COLUMN : NEITHER);
           ++side) {
        const int dim = summed_dim(box, side);
        const int64_t outputs = runs * inner / along(box, dim), chunks = num_chunks(box, dim);
        const int64_t most = dim == INNER ? WARP_OUTPUTS : OUTPUTS;
        if (side != NEITHER) {
          w.side_at[2 * b + side] = side_partials;
          side_partials += outputs * chunks;
        }
        for (int64_t chunk = 0; chunk < chunks && tiled_dim(box) < 0; ++chunk) {
          for (int64_t o = 0; o < outputs; o += most) {
            w.side_jobs.push_back(SideJob{b, side, o, std::min(outputs, o + most), chunk, 0});
          }
        }
      }
      const int tiled = item.factored ? tiled_dim(box) : -1;
      const int64_t outers = tiled < 0 ? 0 : runs / box.sizes[tiled];
      for (int64_t outer = 0; outer < outers; ++outer) {
        for (int64_t chunk = 0; chunk < num_chunks(box, tiled); ++chunk) {
          for (int64_t at = 0; at < inner; at += TILE_COLUMNS) {
            const int64_t last = std::min<int64_t>(inner, at + TILE_COLUMNS);
            w.side_jobs.push_back(SideJob{b, BOTH, at, last, chunk, outer});
          }
        }
      }
    }
    // factors are whole on every rank, also where it has no element
    range.first_entry_job = static_cast<int64_t>(w.entry_jobs.size());
    w.entry_jobs.push_back(EntryJob{i, NEITHER, 0, 1});
    for (int64_t side = ROW; item.factored && side <= COLUMN; ++side) {
      const int64_t size = side == ROW ? item.rows : item.cols;
      for (int64_t at = 0; at < size; at += ENTRIES)
        w.entry_jobs.push_back(EntryJob{i, side, at, std::min(size, at + ENTRIES)});
    }
    range.last_entry_job = static_cast<int64_t>(w.entry_jobs.size());
    const size_t factor_jobs = w.factor_jobs.size();
    if (item.factored) deal_factors(item, i, w.factor_jobs);
    range.factor_jobs = static_cast<int64_t>(w.factor_jobs.size() - factor_jobs);
    if (item.numel > 0 && has_small_leads(item)) {
      for (int64_t at = 0; at < item.leads; at += OUTPUTS) {
        w.lead_jobs.push_back(LeadJob{i, at, std::min(item.leads, at + OUTPUTS)});
      }
    }
    range.last_job = static_cast<int64_t>(w.jobs.size());
    range.last_side_job = static_cast<int64_t>(w.side_jobs.size());
    w.ranges.push_back(range);
    w.normalisers_at[i] = leads * MOST_INPUTS;
    leads += item.leads;
    w.first_moment_job.push_back(moment_jobs);
    moment_jobs += num_moment_jobs(item);
  }
  w.first_moment_job.push_back(moment_jobs);
  Plan& p = w.plan;
  p.magic = PLAN_MAGIC;
  p.num_boxes = num_boxes;
  p.num_jobs = static_cast<int64_t>(w.jobs.size());
  p.num_side_jobs = static_cast<int64_t>(w.side_jobs.size());
  p.num_entry_jobs = static_cast<int64_t>(w.entry_jobs.size());
  p.num_factor_jobs = static_cast<int64_t>(w.factor_jobs.size());
  p.num_lead_jobs = static_cast<int64_t>(w.lead_jobs.size());
  p.num_leads = leads;
  p.num_items = num_items;
  p.num_moment_jobs = moment_jobs;
  p.live = take(p, 2 * PASSES * num_items * static_cast<int64_t>(sizeof(Live)));
  p.words = take(p, 2 * num_items * 8);
  p.counters = take(p, num_counters(num_items) * 4);
  p.first_moment_job = take(p, (num_items + 1) * 8);
  p.moment_partials = take(p, moment_jobs * NUM_MOMENTS * 8);
  p.items = take(p, num_items * static_cast<int64_t>(sizeof(Item)));
  p.boxes = take(p, num_boxes * static_cast<int64_t>(sizeof(Box)));
  p.jobs = take(p, p.num_jobs * static_cast<int64_t>(sizeof(Job)));
  p.side_jobs = take(p, p.num_side_jobs * static_cast<int64_t>(sizeof(SideJob)));
  p.side_at = take(p, num_boxes * 16);
  p.entry_jobs = take(p, p.num_entry_jobs * static_cast<int64_t>(sizeof(EntryJob)));
  p.factor_jobs = take(p, p.num_factor_jobs * static_cast<int64_t>(sizeof(FactorJob)));
  p.lead_jobs = take(p, p.num_lead_jobs * static_cast<int64_t>(sizeof(LeadJob)));
  p.ranges = take(p, num_items * static_cast<int64_t>(sizeof(ItemRange)));
  p.normalisers_at = take(p, num_items * 8);
  p.normalisers = take(p, leads * MOST_INPUTS * 4);
  p.networks = take(p, num_items * NETWORK_WORDS * 4);  // an item has one, or shares one
  p.partials = take(p, std::max({side_partials + 2 * p.num_side_jobs, MOST_SUMS * p.num_jobs,
                                 FACTOR_SUMS * p.num_entry_jobs}) *
                           8);
  return w;
}

}  // namespace gpu
}  // namespace pylo_dist
