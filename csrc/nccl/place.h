#pragma once

#include <cstdint>
#include <string>

#include "core/task.h"
#include "nccl/launch_order.h"

namespace pycomm::nccl {

/// A call's place in the launch order, until it was launched or has failed. Belongs to the progress
/// thread.
class Place {
 public:
  Place(LaunchOrder& order, std::uint64_t group)
      : order_(order), group_(group), proposal_(order.propose(group)) {}
  ~Place() { order_.leave(group_); }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  std::uint64_t proposal() const { return proposal_; }
  void agree(std::uint64_t tick) { order_.agree(group_, tick); }

  /// Waits for the call's turn.
  class Next final : public Wait {
   public:
    explicit Next(const Place& place) : place_(place) {}
    bool poll() override { return place_.order_.is_next(place_.group_); }
    std::string describe() const override {
      return "the GPU calls of other groups that come before it";
    }
    bool rings_doorbell() const override { return false; }

   private:
    const Place& place_;
  };

 private:
  LaunchOrder& order_;
  const std::uint64_t group_;
  const std::uint64_t proposal_;
};

}  // namespace pycomm::nccl
