#include "nccl/memory.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"

namespace pycomm::nccl {
namespace {

bool from_nccl(const Device& device) {
  return device.nccl && device.nccl->ncclMemAlloc != nullptr && device.nccl->ncclMemFree != nullptr;
}

std::byte* allocate(const Device& device, std::size_t bytes) {
  const char* const purpose = "buckets";
  const std::size_t asked = std::max<std::size_t>(bytes, 1);
  if (!from_nccl(device)) return device.allocate(asked, purpose);
  const Device::Current current(device);
  void* address = nullptr;
  if (const auto result = device.nccl->ncclMemAlloc(&address, asked); result != ncclSuccess) {
    throw device.no_memory(asked, purpose,
                           std::string("ncclMemAlloc: ") + device.nccl->ncclGetErrorString(result));
  }
  return static_cast<std::byte*>(address);
}

}  // namespace

Memory::Memory(std::shared_ptr<const Device> device, std::size_t bytes, StreamAddress stream)
    : DeviceMemory(allocate(*device, bytes), bytes, device->ordinal), gpu_(std::move(device)) {
  const Device::Current current(*gpu_);
  gpu_->cuda.check(
      gpu_->cuda.cudaMemsetAsync(data(), 0, bytes, reinterpret_cast<cudaStream_t>(stream)),
      "cudaMemsetAsync");
}

Memory::~Memory() {
  if (in_forked_child()) return;  // CUDA does not survive a fork
  try {
    const Device::Current current(*gpu_);
    gpu_->cuda.check(gpu_->cuda.cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (from_nccl(*gpu_)) {
      gpu_->nccl->ncclMemFree(data());
    } else {
      gpu_->cuda.cudaFree(data());
    }
  } catch (const CommError&) {
    // The GPU, or all of CUDA, is gone before us, and the memory with it.
  }
}

}  // namespace pycomm::nccl
