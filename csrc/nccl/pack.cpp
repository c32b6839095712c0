#include "nccl/pack.h"

#include <vector>

#include "core/error.h"

namespace pycomm::nccl {

const Kernels* Packer::kernels() {
  std::lock_guard lock(mutex_);
  if (!tried_) {
    tried_ = true;
    try {
      const KernelImage image(path_);
      kernels_.emplace(device_->cuda, image);
    } catch (const CommError&) {
      // What CUDA copies by itself will do.
    }
  }
  return kernels_ ? &*kernels_ : nullptr;
}

void Packer::copy(DType dtype, std::span<const cuda::Segment> segments, StreamAddress stream) {
  const Device::Current current(*device_);
  const CudaTable& cuda = device_->cuda;
  const cudaStream_t on = stream_at(stream);
  const Kernels* const loaded = kernels();
  std::vector<cuda::Segment> pieces;
  for (const cuda::Segment& segment : segments) {
    if (segment.count == 0) continue;
    const std::size_t bytes = segment.count * size_of(dtype);
    if (segment.from == nullptr) {
      cuda.check(cuda.cudaMemsetAsync(segment.to, 0, bytes, on), "cudaMemsetAsync");
    } else if (loaded == nullptr) {
      cuda.check(
          cuda.cudaMemcpyAsync(segment.to, segment.from, bytes, cudaMemcpyDeviceToDevice, on),
          "cudaMemcpyAsync");
    } else {
      pieces.push_back(segment);
    }
  }
  if (pieces.empty()) return;
  Kernels::StreamLauncher launcher(*loaded, on);
  cuda::copy_segments(launcher, {dtype, dtype}, pieces);
}

}  // namespace pycomm::nccl
