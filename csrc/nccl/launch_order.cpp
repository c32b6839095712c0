#include "nccl/launch_order.h"

#include <algorithm>

namespace pycomm::nccl {

std::uint64_t LaunchOrder::propose(std::uint64_t group) {
  calls_[group] = {++latest_, false};
  return latest_;
}

void LaunchOrder::agree(std::uint64_t group, std::uint64_t tick) {
  calls_.at(group) = {tick, true};
  latest_ = std::max(latest_, tick);  // what begins from now on comes later
}

bool LaunchOrder::is_next(std::uint64_t group) const {
  const auto mine = calls_.find(group);
  if (mine == calls_.end() || !mine->second.agreed) return false;
  const Time time{mine->second.tick, group};
  // What is not agreed can only become later than it proposed.
  return std::all_of(calls_.begin(), calls_.end(), [&](const auto& other) {
    return time <= Time{other.second.tick, other.first};
  });
}

void LaunchOrder::leave(std::uint64_t group) { calls_.erase(group); }

}  // namespace pycomm::nccl
