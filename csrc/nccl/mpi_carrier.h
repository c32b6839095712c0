#pragma once

#include <memory>
#include <vector>

#include "nccl/exchange.h"
#include "transport/channel.h"

namespace pycomm::nccl {

/// Messages of an MPI that takes pointers to GPU memory ("CUDA-aware"). MPI knows no streams, so
/// the host waits for the GPU before it has MPI move anything, and for all messages before it goes
/// on.
///
/// MPI may write to memory of an exchange that has failed until the process ends: it has to be
/// memory that nobody else gets then.
///
/// Not beside kernels of NCCL, which hold the GPU while MPI may wait for it: see choice.h.
class MpiCarrier final : public Carrier {
 public:
  /// @param tag    of the channel, for this carrier alone while it carries.
  /// @param world_ranks  of the exchanges' peers.
  MpiCarrier(std::shared_ptr<const Device> device, Channel& channel, int tag, int rank,
             const std::vector<int>& world_ranks)
      : device_(std::move(device)),
        channel_(channel),
        tag_(tag),
        rank_(rank),
        world_ranks_(world_ranks) {}

  const Device& device() const override { return *device_; }
  Task<> carry(const Exchange& exchange) override;

 private:
  /// What this rank sends to itself.
  void copy_own(const Exchange& exchange);

  const std::shared_ptr<const Device> device_;
  Channel& channel_;
  const int tag_;
  const int rank_;
  const std::vector<int>& world_ranks_;
};

}  // namespace pycomm::nccl
