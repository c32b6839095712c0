#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/task.h"
#include "nccl/device.h"

namespace pycomm::nccl {

/// NCCL's connection of the GPUs of a group; freed with the object, whatever has happened.
class Communicator {
 public:
  /// Begins to connect: wait for Accepted then. Every rank of the group does this.
  Communicator(std::shared_ptr<const Device> device, const ncclUniqueId& id, int size, int rank);
  /// Gives up what has not ended; if all has, leaves in peace: within seconds, since the other
  /// ranks, which have the same calls, do so too.
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  ncclComm_t handle() const { return handle_; }
  const Device& device() const { return *device_; }
  const std::shared_ptr<const Device>& shared_device() const { return device_; }

  /// NCCL has begun with what was asked of it last. (It is non-blocking: a call that returns
  /// ncclInProgress has put nothing on the stream yet.)
  class Accepted final : public Wait {
   public:
    explicit Accepted(const Communicator& communicator) : communicator_(communicator) {}
    bool poll() override { return communicator_.accepted(); }
    std::string describe() const override {
      return "NCCL to connect the ranks' GPUs, or to take a call";
    }
    bool rings_doorbell() const override { return false; }

   private:
    const Communicator& communicator_;
  };

  /// Begins to connect those ranks that are left without `excluded` (ranks of this communicator),
  /// numbered in the order they have here: for recovery. All of them call it, the excluded ones
  /// must not. Wait for the result's Accepted; until then this communicator has to live. It is of
  /// no use afterwards, and its memory is not known to the new one.
  ///
  /// @param has_failed  calls may hang on the GPU: NCCL drops them first. If not, none is there.
  /// @throws InvalidArgumentError  nobody is excluded.
  /// @throws CommError  this NCCL is too old for it, or its error is of a kind that lasts.
  std::unique_ptr<Communicator> shrink(std::vector<int> excluded, bool has_failed);

  /// @throws PeerLostError  NCCL has lost another rank.
  /// @throws CommError      any other error; the communicator is of no use then.
  bool accepted() const;

  /// Waits, in this thread, until accepted(): for what only this rank takes part in, or all are
  /// known to.
  /// @throws CommError  also if NCCL takes longer than ten seconds.
  void settle() const;

  /// Throws as accepted() unless `result`, of `call`, is a success or still to come.
  void check(ncclResult_t result, const char* call) const;

  /// The GPU drops whatever has not ended.
  void abort();

 private:
  explicit Communicator(Communicator& parent);
  void leave();

  const std::shared_ptr<const Device> device_;
  const NcclTable& nccl_;
  ncclComm_t handle_ = nullptr;
  /// Of one that has begun to shrink: writes the handle, and tells when.
  mutable Communicator* parent_ = nullptr;
};

}  // namespace pycomm::nccl
