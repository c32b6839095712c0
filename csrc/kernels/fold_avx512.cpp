// Compiled with AVX-512 F, BW, VL and DQ; called only where fold_levels() found all of them.
#if defined(__x86_64__)
#define PYCOMM_FOLD_FUNCTION fold_avx512
#define PYCOMM_FOLD_VECTOR_BYTES 64
#include "kernels/fold_impl.h"
#endif
