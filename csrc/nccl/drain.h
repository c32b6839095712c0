#pragma once

#include <chrono>
#include <thread>

namespace pycomm::nccl {

/// Waits, in this thread, until nothing of `calls` (a GpuGroup, a GpuPair) is in flight, or until
/// `given_up()` says that the others will not do their part.
/// @returns whether nothing is in flight.
/// @throws CommError  as its poll().
template <typename Calls, typename GivenUp>
bool drain(Calls& calls, const GivenUp& given_up) {
  while (calls.in_flight()) {
    if (given_up()) return false;
    calls.poll();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

/// The same, for as long as the GPU may take.
template <typename Calls>
void drain(Calls& calls) {
  drain(calls, [] { return false; });
}

}  // namespace pycomm::nccl
