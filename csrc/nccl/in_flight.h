#pragma once

#include <deque>
#include <memory>
#include <string>

#include "core/clock.h"
#include "nccl/communicator.h"
#include "nccl/device.h"

namespace pycomm::nccl {

/// The calls of a group, or of a pair, that were launched and have not been seen to end.
class InFlight {
 public:
  /// @param began  when the call was issued; it may take `timeout_s` from then, GPU and all.
  void add(std::shared_ptr<Call> call, std::string description, Clock::time_point began,
           double timeout_s) {
    calls_.push_back({std::move(call), std::move(description), began, timeout_s});
  }
  bool empty() const { return calls_.empty(); }
  void clear() { calls_.clear(); }
  /// The oldest one, for errors; "" if there is none.
  std::string describe() const { return calls_.empty() ? "" : calls_.front().description; }

  /// Look at them, and at what NCCL says of theirs.
  /// @throws CommTimeoutError  the GPU has not come to one for too long.
  /// @throws PeerLostError, CommError  NCCL or the GPU has failed.
  void poll(const Communicator& communicator);
  /// The same without NCCL.
  void poll();

 private:
  void forget_finished();
  void check_deadline() const;

  struct Launched {
    std::shared_ptr<Call> call;
    std::string description;
    Clock::time_point began;
    double timeout_s;
  };
  std::deque<Launched> calls_;  // in the order of the stream
};

}  // namespace pycomm::nccl
