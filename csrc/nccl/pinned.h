#pragma once

#include <cstddef>
#include <memory>

#include "nccl/device.h"
#include "transport/arena.h"

namespace pycomm::nccl {

/// Host memory that the GPU copies from and to by itself, while the host does something else. It
/// lies in this rank's arena, where the other ranks of the host read it without a copy; where CUDA
/// refuses to pin the arena's pages, or the arena is full, elsewhere.
class PinnedMemory {
 public:
  /// @throws CommError  CUDA has no pinned memory left either.
  PinnedMemory(std::shared_ptr<const Device> device, Arena& arena, std::size_t bytes);
  /// The GPU must have finished with it.
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const { return data_; }

  /// Peers or the network may write there to the end of the process: nobody else gets the memory.
  void quarantine();

 private:
  const std::shared_ptr<const Device> device_;
  std::shared_ptr<ArenaBlock> block_;  // null: it is CUDA's
  std::byte* data_ = nullptr;
  bool frees_ = true;
};

}  // namespace pycomm::nccl
