#pragma once

// Runs the CUDA kernels on the CPU: csrc/kernels/cuda/kernels.cu compiled as C++, and a Launcher
// that calls a kernel once for each thread of each block. What a GPU does at the same time happens
// here one after the other, in an order that a test chooses. Nothing here has seen a GPU.

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cuda/arguments.h"

// The words of CUDA that kernels.cu uses.
struct __attribute__((may_alias, aligned(16))) uint4 {
  std::uint32_t x, y, z, w;
};
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__ &  // one copy for all threads

namespace cuda_on_cpu {

struct Index {
  std::uint32_t x;
};

inline thread_local Index thread_index;
inline thread_local Index block_index;

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index

#include "kernels/cuda/kernels.cu"

#undef threadIdx
#undef blockIdx
#undef __global__
#undef __device__
#undef __launch_bounds__
#undef __grid_constant__

namespace cuda_on_cpu {

/// In which order the threads of a launch run. No result may depend on it.
enum class Order { kForward, kBackward, kShuffled };

class CpuLauncher final : public pycomm::cuda::Launcher {
 public:
  explicit CpuLauncher(Order order = Order::kForward) : order_(order) {}

  void launch(pycomm::cuda::Kernel kernel, std::uint32_t block_count,
              const void* arguments) override {
    ++launches;
    blocks += block_count;
    std::vector<std::uint64_t> threads(std::uint64_t{block_count} * pycomm::cuda::kThreads);
    std::iota(threads.begin(), threads.end(), 0);
    if (order_ == Order::kBackward) std::reverse(threads.begin(), threads.end());
    if (order_ == Order::kShuffled) std::shuffle(threads.begin(), threads.end(), random_);
    for (std::uint64_t thread : threads) {
      block_index.x = static_cast<std::uint32_t>(thread / pycomm::cuda::kThreads);
      thread_index.x = static_cast<std::uint32_t>(thread % pycomm::cuda::kThreads);
      run(kernel, arguments);
    }
  }

  std::uint64_t launches = 0;
  std::uint64_t blocks = 0;

 private:
  static void run(pycomm::cuda::Kernel kernel, const void* arguments) {
    using namespace pycomm::cuda;
    switch (kernel) {
#define PYCOMM_CUDA_RUN(source, Source, destination, Destination)                                  \
  case Kernel::kCopy##Source##To##Destination:                                                     \
    return pycomm_copy_##source##_to_##destination(*static_cast<const CopyArguments*>(arguments)); \
  case Kernel::kFold##Source##To##Destination:                                                     \
    return pycomm_fold_##source##_to_##destination(*static_cast<const FoldArguments*>(arguments));
      PYCOMM_CUDA_DTYPE_PAIRS(PYCOMM_CUDA_RUN)
#undef PYCOMM_CUDA_RUN
    }
  }

  Order order_;
  std::mt19937_64 random_{7};
};

}  // namespace cuda_on_cpu
