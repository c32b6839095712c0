#pragma once

#include <chrono>
#include <string>
#include <vector>

namespace pycomm {

/// Passes descriptors of shared memory between the ranks of one host, over Unix sockets in the
/// abstract namespace (no file, gone with the process). Both ends check that the other runs as the
/// same user; who gives a descriptor away checks that the other knows the job's token.
class Handover {
 public:
  /// Opens this rank's socket under a random name.
  Handover();
  ~Handover();
  Handover(const Handover&) = delete;
  Handover& operator=(const Handover&) = delete;

  /// To be told to the other ranks of the host, out of band.
  const std::string& address() const { return address_; }

  /// Give `descriptor` to every other rank of the host and receive theirs.
  ///
  /// @param addresses   of all ranks of the host, this one's among them at `local_rank`.
  /// @param world_ranks their ranks in the world, for errors.
  /// @param token       known to the ranks of this job alone.
  /// @return  one descriptor for each rank, owned by the caller; -1 at `local_rank`.
  /// @throws PeerLostError  a rank did not come within `timeout`.
  std::vector<int> exchange(int local_rank, const std::vector<std::string>& addresses,
                            const std::vector<int>& world_ranks, const std::string& token,
                            int descriptor, std::chrono::nanoseconds timeout);

 private:
  int listener_;
  std::string address_;
};

/// `bytes` random bytes as hexadecimal digits.
std::string random_hex(int bytes);

}  // namespace pycomm
