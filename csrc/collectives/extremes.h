#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/signature.h"

namespace pycomm {

/// The two most different signatures that ranks have shown so far, by hash: what the hosts tell
/// each other as they open an operation. Plain bytes, all of which are for errors but the hashes.
struct Extremes {
  struct Entry {
    std::uint64_t hash;
    std::int64_t rank;
    Signature signature;
  };
  Entry lowest;
  Entry highest;

  /// Take in what another host knows.
  /// @param message  as it arrived; the extremes come first in it.
  /// @param expected_bytes  how long it is if all of us agree: other hosts' sums follow then.
  /// @throws CommError  it cannot be such a message.
  void include_message(std::span<const std::byte> message, std::size_t expected_bytes);

  void include(const Entry& entry) {
    if (entry.hash < lowest.hash) lowest = entry;
    if (entry.hash > highest.hash) highest = entry;
  }
  bool agree() const { return lowest.hash == highest.hash; }
  /// @throws MismatchError  unless all agree.
  void check() const;
};

}  // namespace pycomm
