#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "run.h"

namespace simulation {

/// What many runs have seen. Plain numbers, for memory that processes share.
struct Tally {
  std::uint64_t runs = 0;
  std::uint64_t quiet_runs = 0;  // in which no fault came about
  std::uint64_t steps = 0;
  std::uint64_t messages = 0;
  std::uint64_t simulated_ms = 0;
  std::array<std::uint64_t, kFaultKinds> events{};
  std::uint64_t calls = 0;
  std::uint64_t exact = 0;
  std::array<std::uint64_t, 5> errors{};  // by Outcome::Error
  std::uint64_t never_ended = 0;          // on ranks that were killed or stopped

  void add(const Run& run);
  std::string describe(double seconds) const;
};

}  // namespace simulation
