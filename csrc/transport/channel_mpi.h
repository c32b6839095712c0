#pragma once

#include <mpi.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "transport/channel.h"

namespace pycomm {

class MpiInbox;

/// A channel over MPI point-to-point, on a communicator of its own, so that no message of the
/// user's is ever taken for one of pycomm's.
///
/// It needs MPI_THREAD_MULTIPLE, since the process calls MPI from elsewhere too. An MPI
/// error is thrown, never aborts the job: PeerLostError where MPI knows the peer to be gone, else
/// CommError. A message of another length than expected, longer or shorter, is a MismatchError and
/// leaves the buffer as it was; its sender is not told and may wait on. Messages move only while
/// somebody polls; polling one starts every receive whose message has come.
class MpiChannel : public Channel {
 public:
  /// Collective over `original`, of which it makes a duplicate.
  explicit MpiChannel(MPI_Comm original);

  /// Leaves the duplicate to MPI_Finalize. MPI_Comm_free is collective: an MPI may wait in it for
  /// all ranks (Open MPI does so with its UCC component). But channels are destroyed after failures
  /// too, when some peer will never come, and nothing here can tell. A leaked communicator costs a
  /// few kilobytes for each pycomm.init(); a hang costs the job.
  ~MpiChannel() override = default;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::unique_ptr<Message> send(int peer, int tag, std::span<const std::byte> bytes) override;
  std::unique_ptr<Message> receive(int peer, int tag, std::span<std::byte> bytes) override;
  std::unique_ptr<Message> receive_at_most(int peer, int tag, std::span<std::byte> room,
                                           std::size_t& length) override;
  std::optional<Incoming> probe(int tag) override;
  void progress() override;

 private:
  MPI_Comm communicator_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 0;
  bool has_lost_peer_ = false;  // as probe() has been told
  int next_probed_ = 0;
  std::shared_ptr<MpiInbox> inbox_;
};

}  // namespace pycomm
