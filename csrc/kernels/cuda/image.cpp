// libpycomm_cuda.so: the kernels' machine code, as data. cmake/PycommCuda.cmake has nvcc make the
// file that PYCOMM_CUDA_FATBIN names.

#include "kernels/cuda/kernels.h"

// In the section where nvcc itself would have put it, so that cuobjdump and debuggers find it.
asm(R"(
  .pushsection .nv_fatbin, "a", @progbits
  .balign 64
  .globl pycomm_cuda_code_begin
  .globl pycomm_cuda_code_end
  .hidden pycomm_cuda_code_begin
  .hidden pycomm_cuda_code_end
pycomm_cuda_code_begin:
  .incbin ")" PYCOMM_CUDA_FATBIN R"("
pycomm_cuda_code_end:
  .popsection
)");

extern "C" {
extern const char pycomm_cuda_code_begin[];
extern const char pycomm_cuda_code_end[];

__attribute__((visibility("default"))) const pycomm::cuda::Image* pycomm_cuda_image() {
  static const pycomm::cuda::Image image{
      pycomm::cuda::kImageAbi, pycomm_cuda_code_begin,
      static_cast<std::size_t>(pycomm_cuda_code_end - pycomm_cuda_code_begin),
      PYCOMM_CUDA_BUILT_BY};
  return &image;
}
}
