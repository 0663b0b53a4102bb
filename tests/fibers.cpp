// The operators of csrc/cuda.cu on a CPU, as torch.ops.pylo_dist_fibers: the same kernels and launchers, with fibers for threads.
#define PYLO_FIBERS
#include "fibers.h"

#include "cuda.cu"

namespace fibers {

// All lanes of a warp bring their fragments; the last one multiplies for all.
void mma(pylo_dist::lanes::Accumulator& c, const pylo_dist::lanes::Left& a, const pylo_dist::lanes::Right& b) {
  using namespace pylo_dist::lanes;
  Block& now = *block;
  const int me = now.running, first = me / WARP * WARP;
  now.operands[me][0] = &c;
  now.operands[me][1] = const_cast<Left*>(&a);
  now.operands[me][2] = const_cast<Right*>(&b);
  warp_wait();
  if (me == first) {
    EmulatedWarp<true>::mma([&](int lane) -> Accumulator& { return *static_cast<Accumulator*>(now.operands[first + lane][0]); },
                            [&](int lane) -> const Left& { return *static_cast<Left*>(now.operands[first + lane][1]); },
                            [&](int lane) -> const Right& { return *static_cast<Right*>(now.operands[first + lane][2]); });
  }
  warp_wait();
}

}  // namespace fibers

extern "C" int64_t fibers_launches() { return fibers::launches; }

STABLE_TORCH_LIBRARY(pylo_dist_fibers, m) {
  m.def(
      "gradient_pass(Tensor items, Tensor boxes, int[] active, Tensor[] grads, Tensor limits, bool replace, Tensor(a!)[] sums, "
      "Tensor(w!)[] workspace) -> ()");
  m.def(
      "moment_pass(Tensor items, Tensor boxes, Tensor[] values, Tensor[] momentum, Tensor[] rms, Tensor(a!)[] sums, "
      "Tensor(w!)[] workspace) -> ()");
  m.def(
      "feature_pass(Tensor items, Tensor boxes, int[] active, float[] rule, bool extended, Tensor[] values, Tensor[] grads, "
      "Tensor[] momentum, Tensor[] rms, Tensor(a!)[] row_or_diag, Tensor(b!)[] col, Tensor[] sums_a, Tensor keep, Tensor scale, "
      "Tensor(c!) factors, Tensor(d!) squares, Tensor(e!)[] sums_b, Tensor(w!)[] workspace) -> ()");
  m.def(
      "update_pass(Tensor items, Tensor boxes, int[] active, float[] rule, bool extended, int hidden, int precision, "
      "Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momentum, Tensor(c!)[] rms, Tensor(d!)[] row_or_diag, Tensor[] col, "
      "Tensor factors, Tensor squares, Tensor[] sums_b, Tensor keep, Tensor scale, Tensor networks, Tensor network_of, "
      "Tensor steps, Tensor(e!) param_squares, Tensor(f!) update_squares, Tensor(g!)[] directions, Tensor(w!)[] workspace) -> ()");
  m.def("workspace_sizes(Tensor items, Tensor boxes, Tensor like) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist_fibers, CPU, m) {
  using namespace pylo_dist::gpu;
  m.impl("gradient_pass", TORCH_BOX(&gradient_pass));
  m.impl("moment_pass", TORCH_BOX(&moment_pass));
  m.impl("feature_pass", TORCH_BOX(&feature_pass));
  m.impl("update_pass", TORCH_BOX(&update_pass));
  m.impl("workspace_sizes", TORCH_BOX(&workspace_sizes));
}
