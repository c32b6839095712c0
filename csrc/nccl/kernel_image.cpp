#include "nccl/kernel_image.h"

#include <dlfcn.h>

#include "core/error.h"

namespace pycomm::nccl {

KernelImage::KernelImage(const std::string& path) {
  // Held to the end of the process: CUDA may read the image whenever it needs a kernel.
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw CommError(std::string("the CUDA kernels cannot be loaded: ") + dlerror() +
                    ".\n  If there is no such file, this pycomm was built without nvcc: put nvcc "
                    "12.8 or newer on PATH and reinstall pycomm-torch.");
  }
  const auto function = reinterpret_cast<cuda::ImageFunction*>(dlsym(handle, cuda::kImageFunction));
  image_ = function != nullptr ? function() : nullptr;
  if (image_ == nullptr || image_->abi != cuda::kImageAbi) {
    throw CommError("the CUDA kernels in " + path + " are of another build of pycomm (" +
                    (image_ == nullptr ? "no number" : "number " + std::to_string(image_->abi)) +
                    ", this one is " + std::to_string(cuda::kImageAbi) +
                    ").\n  Reinstall pycomm-torch.");
  }
}

Kernels::Kernels(const CudaTable& cuda, const KernelImage& image) : cuda_(cuda) {
  if (!cuda.loads_kernels()) {
    throw CommError("the CUDA kernels need CUDA runtime 12.8 or newer, and " + cuda.library.path() +
                    " is " + cuda_version_text(cuda.version) +
                    ".\n  Install a PyTorch for CUDA 12.8 or newer.");
  }
  cudaLibrary_t library = nullptr;
  const cudaError_t result = cuda.cudaLibraryLoadData(&library, image.image().code, nullptr,
                                                      nullptr, 0, nullptr, nullptr, 0);
  if (result != cudaSuccess) {
    cuda.cudaGetLastError();
    throw CommError(std::string("the CUDA kernels (") + image.image().built_by +
                    ") cannot be loaded: " + cuda.cudaGetErrorName(result) + ", " +
                    cuda.cudaGetErrorString(result) + ". The driver knows CUDA " +
                    cuda_version_text(cuda.driver_version()) +
                    ".\n  Update the driver to one for the CUDA that built them, or rebuild "
                    "pycomm-torch with an older nvcc (12.8 at least).");
  }
  for (const char* const name : cuda::kernel_names()) {
    cudaKernel_t kernel = nullptr;
    cuda.check(cuda.cudaLibraryGetKernel(&kernel, library, name), name);
    kernels_.push_back(kernel);
  }
}

void Kernels::StreamLauncher::launch(cuda::Kernel kernel, std::uint32_t block_count,
                                     const void* arguments) {
  const cudaKernel_t loaded = kernels_.kernels_[static_cast<std::size_t>(kernel)];
  cudaLaunchConfig_t config{};
  config.gridDim = {block_count, 1, 1};
  config.blockDim = {cuda::kThreads, 1, 1};
  config.stream = stream_;
  void* parameters[] = {const_cast<void*>(arguments)};
  kernels_.cuda_.check(kernels_.cuda_.cudaLaunchKernelExC(
                           &config, reinterpret_cast<const void*>(loaded), parameters),
                       cuda::kernel_names()[static_cast<std::size_t>(kernel)]);
}

}  // namespace pycomm::nccl
