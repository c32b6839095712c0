#pragma once

#include <memory>
#include <span>
#include <utility>

#include "core/dtype.h"
#include "kernels/cuda/kernels.h"
#include "nccl/device.h"

namespace pycomm::nccl {

/// Copies many pieces of GPU memory at once. Calls from any thread.
class Packer {
 public:
  explicit Packer(std::shared_ptr<const Device> device) : device_(std::move(device)) {}

  /// Copy each segment's elements, floats of `dtype`, bit for bit; where `from` is null, write
  /// zeros. In order behind what is on `stream`, without waiting.
  ///
  /// Cost: one launch for each 136 segments. Where our kernels cannot be loaded (`python -m pycomm
  /// info` says why), one copy of CUDA's for each.
  void copy(DType dtype, std::span<const cuda::Segment> segments, StreamAddress stream);

 private:
  const std::shared_ptr<const Device> device_;
};

}  // namespace pycomm::nccl
