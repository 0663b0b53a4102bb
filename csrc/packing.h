// Tensors that are copied to their places in a bucket, and what is noted of them in the same
// reading.
#pragma once

#include "pylo_dist/geometry.h"

namespace pylo_dist {

// Rows of `columns` neighbours each, which begin `pitch` elements apart.
struct Pair {
  const void* from;
  void* to;
  int64_t rows, columns, from_pitch, to_pitch;
  int32_t from_type, to_type;
};

// The least and the largest number that was read; NaN where one was. -0 may stand for 0.
struct Ends {
  float lowest, highest;
};

}  // namespace pylo_dist
