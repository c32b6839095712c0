// The stand-in for libpycomm_cuda.so: an image that nothing looks into.

#include "kernels/cuda/kernels.h"

extern "C" __attribute__((visibility("default"))) const pycomm::cuda::Image* pycomm_cuda_image() {
  static const char code[] = "no machine code";
  static const pycomm::cuda::Image image{pycomm::cuda::kImageAbi, code, sizeof(code), "the double"};
  return &image;
}
