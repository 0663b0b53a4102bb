// The operators of the passes: every name and schema once, for the library that defines them, the
// backends that implement them and the tests. csrc/README.md says what each reads and writes.
#pragma once

// OP(name, schema) for every pass.
// clang-format off
#define PYLO_DIST_PASSES(OP)                                                                      \
  OP(gradient_pass,                                                                               \
     "(Tensor items, Tensor boxes, int[] active, Tensor[] grads, Tensor limits, bool "            \
     "replace, Tensor(a!)[] sums, Tensor(w!)[] workspace) -> ()")                                 \
  OP(moment_pass,                                                                                 \
     "(Tensor items, Tensor boxes, int[] active, Tensor[] values, Tensor[] momentum, "            \
     "Tensor[] rms, Tensor(a!)[] sums, Tensor(w!)[] workspace) -> ()")                            \
  OP(feature_pass,                                                                                \
     "(Tensor items, Tensor boxes, int[] active, float[] rule, bool extended, Tensor[] "          \
     "values, Tensor[] grads, Tensor[] momentum, Tensor[] rms, Tensor(a!)[] row_or_diag, "        \
     "Tensor(b!)[] col, Tensor[] sums_a, Tensor moves, Tensor scale, Tensor(c!) factors, "        \
     "Tensor(d!) squares, Tensor(e!)[] sums_b, Tensor(w!)[] workspace) -> ()")                    \
  OP(update_pass,                                                                                 \
     "(Tensor items, Tensor boxes, int[] active, float[] rule, bool extended, int hidden, "       \
     "int precision, Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momentum, "                \
     "Tensor(c!)[] rms, Tensor(d!)[] row_or_diag, Tensor[] col, Tensor factors, Tensor "          \
     "squares, Tensor[] sums_b, Tensor moves, Tensor scale, Tensor networks, Tensor "             \
     "network_of, Tensor steps, Tensor(e!) param_squares, Tensor(f!) update_squares, "            \
     "Tensor(g!)[] directions, Tensor(w!)[] workspace, Tensor? keys) -> ()")                      \
  OP(copy_pass, "(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!) ends) -> ()")                \
  OP(workspace_sizes,                                                                             \
     "(Tensor items, Tensor boxes, Tensor like) -> int[]") /* for the device of `like` */

// The same for AdamW's step of some tensors, which has no tables.
#define PYLO_DIST_ADAMW(OP)                                                                       \
  OP(square_sums, "(Tensor[] values, Tensor(a!) sums, Tensor(w!)[] workspace) -> ()")             \
  OP(adamw_pass,                                                                                  \
     "(int[] active, Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] "      \
     "squares, float[] rule, Tensor numbers, Tensor moves, Tensor scale, Tensor(d!) "             \
     "update_squares, Tensor[] rounding, Tensor(w!)[] workspace) -> ()")                          \
  OP(adamw_workspace, "(Tensor[] values) -> int") /* bytes, for the device of `values` */
// clang-format on

// In a block of STABLE_TORCH_LIBRARY or STABLE_TORCH_LIBRARY_IMPL, where the functions of those
// names can be seen.
#define PYLO_DIST_DEFINE(name, schema) m.def(#name schema);
#define PYLO_DIST_IMPLEMENT(name, schema) m.impl(#name, TORCH_BOX(&name));
