#pragma once

#include <cstddef>
#include <string>

namespace pycomm {

/// What a rank tells all others when the world is made.
struct Introduction {
  /// Of its Handover.
  std::string address;
  std::size_t arena_bytes = 0;
  /// Random; rank 0's is the job's.
  std::string token;
  /// May contain anything.
  std::string host_key;

  std::string encode() const;

  /// @param rank  who sent it, for errors.
  /// @throws CommError  it is no introduction, or one of another version of pycomm.
  static Introduction decode(const std::string& text, int rank);
};

}  // namespace pycomm
