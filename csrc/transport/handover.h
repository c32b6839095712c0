#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "core/interrupt_check.h"
#include "transport/descriptor.h"

namespace pycomm {

/// Passes descriptors of shared memory between the ranks of one host, over Unix sockets in the
/// abstract namespace (no file, gone with the process). Both ends check that the other runs as the
/// same user; who gives a descriptor away checks that the other knows the job's token. Anybody can
/// call a socket in that namespace: strangers are hung up on, whatever they send or do not send,
/// and keep nobody waiting.
class Handover {
 public:
  /// Opens this rank's socket under a random name.
  Handover();
  ~Handover();
  /// Characters of a token, hexadecimal digits.
  static constexpr int kTokenLength = 32;
  /// Whether a rank can have had this as its address().
  static bool is_address(std::string_view text);

  Handover(const Handover&) = delete;
  Handover& operator=(const Handover&) = delete;

  /// To be told to the other ranks of the host, out of band.
  const std::string& address() const { return address_; }

  /// Give `descriptor` to every other rank of the host and receive theirs.
  ///
  /// @param addresses   of all ranks of the host, this one's among them at `local_rank`.
  /// @param world_ranks their ranks in the world, for errors.
  /// @param token       known to the ranks of this job alone.
  /// @return  one descriptor for each rank; none at `local_rank`.
  /// @throws PeerLostError  a rank did not come within `timeout`, or has ended.
  /// @throws CommError  a rank runs as another user.
  std::vector<Descriptor> exchange(int local_rank, const std::vector<std::string>& addresses,
                                   const std::vector<int>& world_ranks, const std::string& token,
                                   int descriptor, std::chrono::nanoseconds timeout,
                                   const InterruptCheck& check_interrupt = {});

 private:
  int listener_;
  std::string address_;
};

/// `bytes` random bytes as hexadecimal digits.
std::string random_hex(int bytes);

}  // namespace pycomm
