#define PYLO_ISA avx2
#include "cpu_kernels.h"

namespace pylo_dist {
extern const Kernels kernels_avx2 = {"avx2", gradients, moments, features, network_bytes,
                                     pack,   updates,   copy,    adamw,    squares};
}
