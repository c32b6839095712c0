#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "check.h"

// What the tests against the double (tests/double/) send, and what they look for.

using Floats = std::vector<float>;

/// Whole numbers, different on each rank, with exact sums.
inline Floats values(int rank, std::size_t count) {
  Floats made(count);
  for (std::size_t i = 0; i < count; ++i) made[i] = static_cast<float>(rank * 1000 + int(i) % 97);
  return made;
}

inline Floats sums(int size, std::size_t count) {
  Floats sum(count);
  for (int rank = 0; rank < size; ++rank) {
    const Floats one = values(rank, count);
    for (std::size_t i = 0; i < count; ++i) sum[i] += one[i];
  }
  return sum;
}

inline void no_check() {}

inline int highest_priority() {
  int lowest = 0;
  int highest = 0;
  cudaDeviceGetStreamPriorityRange(&lowest, &highest);
  return highest;
}

/// What the body's failed check said; "" if none did.
inline std::string failure_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const check::Failure& failure) {
    return failure.what();
  }
  return "";
}

inline void check_all(const std::vector<std::string>& errors, const std::string& part) {
  for (const std::string& error : errors) {
    if (error.find(part) == std::string::npos) {
      throw check::Failure("an error without \"" + part + "\": \"" + error + "\"");
    }
  }
}
