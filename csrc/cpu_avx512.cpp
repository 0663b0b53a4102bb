#define PYLO_ISA avx512
#include "cpu_kernels.h"

namespace pylo_dist {
extern const Kernels kernels_avx512 = {"avx512", gradients, moments, features, network_bytes,
                                     pack,   updates,   copy,    adamw,    squares};
}
