#pragma once

#include <memory>

#include "core/device_memory.h"
#include "nccl/device.h"

namespace pycomm::nccl {

/// Memory as NCCL likes it best: from ncclMemAlloc, where NCCL has that, else from CUDA.
class Memory final : public DeviceMemory {
 public:
  /// Zeroed on `stream`, which is of this GPU.
  /// @throws CommError  there is not so much left.
  Memory(std::shared_ptr<const Device> device, std::size_t bytes, StreamAddress stream);
  /// Waits for the whole GPU: nobody knows on which streams somebody still uses the memory, and
  /// ncclMemFree, unlike cudaFree, does not ask.
  ~Memory() override;

 private:
  const std::shared_ptr<const Device> gpu_;
};

}  // namespace pycomm::nccl
