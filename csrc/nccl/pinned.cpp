#include "nccl/pinned.h"

#include <string>
#include <utility>

#include "core/error.h"

namespace pycomm::nccl {
namespace {

std::shared_ptr<ArenaBlock> allocate(Arena& arena, std::size_t bytes) {
  try {
    return arena.allocate(bytes);
  } catch (const CommError&) {
    return nullptr;  // it is full
  }
}

}  // namespace

PinnedMemory::PinnedMemory(std::shared_ptr<const Device> device, Arena& arena, std::size_t bytes)
    : device_(std::move(device)), block_(allocate(arena, bytes)) {
  const CudaTable& cuda = device_->cuda;
  const Device::Current current(*device_);
  if (block_ != nullptr) {
    data_ = block_->data();
    if (cuda.cudaHostRegister(data_, bytes, cudaHostRegisterDefault) == cudaSuccess) return;
    cuda.cudaGetLastError();  // so that PyTorch does not find our error
    block_.reset();
  }
  void* address = nullptr;
  cuda.check(cuda.cudaMallocHost(&address, bytes), "cudaMallocHost");
  data_ = static_cast<std::byte*>(address);
}

void PinnedMemory::quarantine() {
  if (block_ != nullptr) ArenaBlock::quarantine(block_);
  frees_ = false;
}

// What fails here fails because the GPU, or all of CUDA, is gone before us.
PinnedMemory::~PinnedMemory() {
  if (block_ != nullptr) {
    device_->cuda.cudaHostUnregister(data_);
  } else if (frees_) {
    device_->cuda.cudaFreeHost(data_);
  }
}

}  // namespace pycomm::nccl
