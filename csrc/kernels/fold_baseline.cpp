// The instruction set every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.
#define PYCOMM_FOLD_FUNCTION fold_baseline
#define PYCOMM_FOLD_VECTOR_BYTES 16
#include "kernels/fold_impl.h"
