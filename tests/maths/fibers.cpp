// The operators of csrc/cuda.cu on a CPU, as torch.ops.pylo_dist_fibers: the same kernels and
// launchers, with fibers for threads.
#define PYLO_FIBERS
#include "fibers.h"

#include "cuda.cu"
#include "emulated_warp.h"

namespace fibers {

// All lanes of a warp bring their fragments; the last one multiplies for all.
void mma(pylo_dist::lanes::Accumulator& c, const pylo_dist::lanes::Left& a,
         const pylo_dist::lanes::Right& b) {
  using namespace pylo_dist::lanes;
  Block& now = *block;
  const int me = now.running, first = me / WARP * WARP;
  now.operands[me][0] = &c;
  now.operands[me][1] = const_cast<Left*>(&a);
  now.operands[me][2] = const_cast<Right*>(&b);
  warp_wait();
  if (me == first) {
    EmulatedWarp<true>::mma(
        [&](int lane) -> Accumulator& {
          return *static_cast<Accumulator*>(now.operands[first + lane][0]);
        },
        [&](int lane) -> const Left& { return *static_cast<Left*>(now.operands[first + lane][1]); },
        [&](int lane) -> const Right& {
          return *static_cast<Right*>(now.operands[first + lane][2]);
        });
  }
  warp_wait();
}

}  // namespace fibers

extern "C" int64_t fibers_launches() { return fibers::launches; }

extern "C" void fibers_machine(int most_blocks, bool two_floats) {
  fibers::most_blocks = most_blocks;
  fibers::two_floats = two_floats;
}

// A thread's sum of numbers, or of their squares, settled after every so many.
extern "C" double fibers_sum(const float* x, int64_t count, bool squares, int64_t settled) {
  pylo_dist::gpu::Sum<false> sum;
  for (int64_t i = 0; i < count; ++i) {
    squares ? sum.add_square(x[i]) : sum.add(x[i]);
    if (i % settled == settled - 1) sum.settle();
  }
  return sum.get();
}

// Numbers as bfloat16, two and two, rounded with 16 random bits each.
extern "C" void fibers_round(const float* x, const uint32_t* random, int64_t count, uint16_t* to) {
  using namespace pylo_dist::gpu;
  for (int64_t i = 0; i < count; i += 2) {
    const uint32_t two = is_usual(x[i]) & is_usual(x[i + 1])
                             ? round_two<true>(x[i], x[i + 1], random[i], random[i + 1])
                             : round_two<false>(x[i], x[i + 1], random[i], random[i + 1]);
    std::memcpy(to + i, &two, sizeof two);
  }
}

STABLE_TORCH_LIBRARY(pylo_dist_fibers, m) {
  PYLO_DIST_PASSES(PYLO_DIST_DEFINE)
  PYLO_DIST_ADAMW(PYLO_DIST_DEFINE)
  m.def("table_fields(str table) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist_fibers, CompositeExplicitAutograd, m) {
  m.impl("table_fields", TORCH_BOX(&pylo_dist::table_fields));
}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist_fibers, CPU, m) {
  using namespace pylo_dist::gpu;
  PYLO_DIST_PASSES(PYLO_DIST_IMPLEMENT)
  PYLO_DIST_ADAMW(PYLO_DIST_IMPLEMENT)
}
