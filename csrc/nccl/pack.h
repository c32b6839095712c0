#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "core/dtype.h"
#include "kernels/cuda/kernels.h"
#include "nccl/device.h"
#include "nccl/kernel_image.h"

namespace pycomm::nccl {

/// Copies many pieces of GPU memory at once. Calls from any thread.
class Packer {
 public:
  /// @param kernels  file of our kernels, loaded when first needed.
  Packer(std::shared_ptr<const Device> device, std::string kernels)
      : device_(std::move(device)), path_(std::move(kernels)) {}

  /// Copy each segment's elements, floats of `dtype`, bit for bit; where `from` is null, write
  /// zeros. In order behind what is on `stream`, without waiting.
  ///
  /// Cost: one launch for each 136 segments. Where our kernels cannot be loaded (`python -m pycomm
  /// info` says why), one copy of CUDA's for each.
  void copy(DType dtype, std::span<const cuda::Segment> segments, StreamAddress stream);

 private:
  /// Null: they cannot be loaded.
  const Kernels* kernels();

  const std::shared_ptr<const Device> device_;
  const std::string path_;
  std::mutex mutex_;
  bool tried_ = false;
  std::optional<Kernels> kernels_;
};

}  // namespace pycomm::nccl
