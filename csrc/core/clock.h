#pragma once

#include <chrono>
#include <cstdint>

#include "core/simulation.h"

namespace pycomm {

/// The time by which the core measures its waits: the machine's steady clock, or a simulation's.
struct Clock {
  using duration = std::chrono::steady_clock::duration;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::steady_clock::time_point;
  static constexpr bool is_steady = true;

  static time_point now() {
    if (auto* const simulation = Simulation::current()) {
      return time_point(simulation->now());
    }
    return std::chrono::steady_clock::now();
  }
  /// In nanoseconds, for records that other processes read.
  static std::int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now().time_since_epoch()).count();
  }
};

}  // namespace pycomm
