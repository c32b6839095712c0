// Compiled with -mavx2 -mf16c; called only where fold_levels() found both.
#if defined(__x86_64__)
#define PYCOMM_FOLD_FUNCTION fold_avx2
#define PYCOMM_FOLD_VECTOR_BYTES 32
#include "kernels/fold_impl.h"
#endif
