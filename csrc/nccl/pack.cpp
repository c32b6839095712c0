#include "nccl/pack.h"

#include <vector>

namespace pycomm::nccl {

void Packer::copy(DType dtype, std::span<const cuda::Segment> segments, StreamAddress stream) {
  const Device::Current current(*device_);
  const CudaTable& cuda = device_->cuda;
  const cudaStream_t on = stream_at(stream);
  const Kernels* const loaded = device_->kernels();
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
