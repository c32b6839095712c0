#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "nccl/cuda_table.h"

namespace pycomm::nccl {

/// Our kernels' machine code, in libpycomm_cuda.so beside the core.
class KernelImage {
 public:
  /// Needs no GPU.
  /// @throws CommError  the file is missing (this build had no nvcc), unreadable, or of another
  ///         build.
  explicit KernelImage(const std::string& path);

  const cuda::Image& image() const { return *image_; }

 private:
  const cuda::Image* image_;
};

/// The kernels as CUDA has loaded them: on every GPU of the process, lazily.
class Kernels {
 public:
  /// @throws CommError  the runtime cannot load kernels (it is older than 12.8), the driver knows
  ///         neither machine code nor PTX of this image, or a kernel is not in it.
  Kernels(const CudaTable& cuda, const KernelImage& image);

  /// Starts kernels on `stream`, of the device that is current then.
  class StreamLauncher final : public cuda::Launcher {
   public:
    StreamLauncher(const Kernels& kernels, cudaStream_t stream)
        : kernels_(kernels), stream_(stream) {}
    void launch(cuda::Kernel kernel, std::uint32_t block_count, const void* arguments) override;

   private:
    const Kernels& kernels_;
    const cudaStream_t stream_;
  };

 private:
  const CudaTable& cuda_;
  std::vector<cudaKernel_t> kernels_;  // by cuda::Kernel
};

}  // namespace pycomm::nccl
