#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "nccl/device.h"
#include "nccl/pieces.h"
#include "nccl/pinned.h"

namespace pycomm::nccl {

/// Three pieces of memory through which tensors of a GPU go, one after the other: a copy into a
/// slot ("down"), whatever carries it to other ranks, a copy out of one ("up"). Each direction has
/// a stream, so that three pieces can be on their way at once. Belongs to the progress thread.
class Slots {
 public:
  static constexpr std::size_t kCount = 3;

  /// In pinned memory of the host.
  static std::unique_ptr<Slots> on_host(const std::shared_ptr<const Device>& device, Arena& arena,
                                        std::size_t slot_bytes);
  /// In memory of the GPU that nothing else uses, with so much scratch beside it.
  static std::unique_ptr<Slots> on_gpu(const std::shared_ptr<const Device>& device,
                                       std::size_t slot_bytes, std::size_t scratch_bytes);

  /// Free them, or, if the GPU does not come to the end of what it was given, keep them to the end
  /// of the process. Waits a little for the GPU.
  /// @param aborted  peers, or the network, may write there for ever: nobody else gets the memory.
  /// @return  whether the GPU has finished.
  static bool leave(std::unique_ptr<Slots> slots, bool aborted);

  std::byte* of(std::size_t piece) const { return memory() + piece % kCount * slot_bytes_; }
  std::span<std::byte> scratch() const {
    return {memory() + kCount * slot_bytes_, memory_bytes_ - kCount * slot_bytes_};
  }

  cudaStream_t down() const { return down_.handle(); }
  cudaStream_t up() const { return up_.handle(); }

  /// What the caller's stream has computed before `call` comes before copies from now on.
  void begin(Call& call);
  /// `call` is over once the copies up are.
  void end(Call& call) { call.end_on(up_.handle()); }
  /// Copies from now on come after what `earlier` has written.
  void follow(Call& earlier);

  /// Fill a slot once its last copy up has left it. Of no copies: nothing.
  void copy_down(std::span<const Pieces::Copy> copies, std::size_t piece);
  /// Empty it.
  void copy_up(std::span<const Pieces::Copy> copies, std::size_t piece);
  /// Copies up from now on come after what is on `stream`.
  void up_follows(cudaStream_t stream);

  /// Wait for the copies of a piece.
  Passed filled(std::size_t piece) const { return {at(piece).filled, kCopies}; }
  Passed emptied(std::size_t piece) const { return {at(piece).emptied, kCopies}; }

 private:
  static constexpr const char* kCopies = "this rank's GPU to copy a piece of a tensor";

  struct Slot {
    explicit Slot(const std::shared_ptr<const Device>& device) : filled(device), emptied(device) {}
    Event filled;   // by the last copy down
    Event emptied;  // by the last copy up
  };
  /// Of the GPU; freed unless it may still be written.
  class GpuMemory {
   public:
    GpuMemory(std::shared_ptr<const Device> device, std::size_t bytes);
    ~GpuMemory();
    GpuMemory(const GpuMemory&) = delete;
    GpuMemory& operator=(const GpuMemory&) = delete;

    std::byte* const data;
    bool frees = true;

   private:
    const std::shared_ptr<const Device> device_;
  };

  Slots(const std::shared_ptr<const Device>& device, std::size_t slot_bytes);

  std::byte* memory() const { return on_host_ ? on_host_->data() : on_gpu_->data; }
  Slot& at(std::size_t piece) { return slots_[piece % kCount]; }
  const Slot& at(std::size_t piece) const { return slots_[piece % kCount]; }
  void copy(std::span<const Pieces::Copy> copies, cudaMemcpyKind kind, const Stream& on);
  void quarantine();
  bool idle() const;

  const std::shared_ptr<const Device> device_;
  // Of these slots alone: groups wait for each other nowhere.
  const Stream down_;
  const Stream up_;
  const std::size_t slot_bytes_;
  std::size_t memory_bytes_;
  // One of the two.
  std::optional<PinnedMemory> on_host_;
  std::optional<GpuMemory> on_gpu_;
  std::array<Slot, kCount> slots_{Slot(device_), Slot(device_), Slot(device_)};
};

}  // namespace pycomm::nccl
