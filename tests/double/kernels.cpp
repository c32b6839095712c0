#include "double/kernels.h"

#include <cstring>

#include "support/cuda_on_cpu.h"

namespace gpu_double {

void* reachable(const void* address);  // gpu.h, which includes CUDA's headers

namespace {

using namespace pycomm::cuda;

constexpr const char* kNames[] = {
#define PYCOMM_CUDA_NAME(source, Source, destination, Destination) \
  "pycomm_copy_" #source "_to_" #destination, "pycomm_fold_" #source "_to_" #destination,
    PYCOMM_CUDA_DTYPE_PAIRS(PYCOMM_CUDA_NAME)
#undef PYCOMM_CUDA_NAME
};

/// As Kernel numbers them: copies are even, folds odd.
bool is_copy(int kernel) { return kernel % 2 == 0; }

template <typename T>
void translate(T*& address) {
  if (address != nullptr) address = static_cast<T*>(reachable(address));
}

}  // namespace

int kernel_named(const char* name) {
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (std::strcmp(kNames[i], name) == 0) return i;
  }
  return -1;
}

unsigned kernel_threads() { return kThreads; }

std::shared_ptr<std::vector<std::byte>> kernel_arguments(int kernel, const void* arguments) {
  const std::size_t bytes = is_copy(kernel) ? sizeof(CopyArguments) : sizeof(FoldArguments);
  const auto* const from = static_cast<const std::byte*>(arguments);
  auto copy = std::make_shared<std::vector<std::byte>>(from, from + bytes);
  if (is_copy(kernel)) {
    auto& of = *reinterpret_cast<CopyArguments*>(copy->data());
    for (std::uint32_t i = 0; i < of.segment_count; ++i) {
      of.from[i] = reachable(of.from[i]);
      of.to[i] = reachable(of.to[i]);
    }
    translate(of.device_scale);
    translate(of.found_nonfinite);
  } else {
    auto& of = *reinterpret_cast<FoldArguments*>(copy->data());
    for (std::uint32_t i = 0; i < of.source_count; ++i) of.sources[i] = reachable(of.sources[i]);
    translate(of.destination);
  }
  return copy;
}

void run_kernel(int kernel, std::uint32_t block_count, const std::vector<std::byte>& arguments) {
  cuda_on_cpu::CpuLauncher(cuda_on_cpu::Order::kShuffled)
      .launch(static_cast<Kernel>(kernel), block_count, arguments.data());
}

}  // namespace gpu_double
