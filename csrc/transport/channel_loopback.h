#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "transport/channel.h"

namespace pycomm {

class LoopbackMailbox;

/// A channel between ranks that are threads of one process, for tests.
///
/// A send copies its bytes into the receiver's mailbox and is over at once, so it never shows a
/// deadlock that only a network without buffers would have. Everything else is as with MPI: the
/// k-th receive of a (sender, tag) gets the k-th message, whatever order they are polled in; a
/// receive withdrawn before its message came leaves that message to the next one; a length other
/// than expected is a MismatchError.
class LoopbackChannel : public Channel {
 public:
  using Mailboxes = std::vector<std::shared_ptr<LoopbackMailbox>>;  // by rank

  LoopbackChannel(int rank, Mailboxes mailboxes);

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(mailboxes_.size()); }
  std::unique_ptr<Message> send(int peer, int tag, std::span<const std::byte> bytes) override;
  std::unique_ptr<Message> receive(int peer, int tag, std::span<std::byte> bytes) override;
  std::unique_ptr<Message> receive_at_most(int peer, int tag, std::span<std::byte> room,
                                           std::size_t& length) override;
  std::optional<Incoming> probe(int tag) override;
  void progress() override {}

  /// What this rank has sent of data since the channel was made; may be read from any thread.
  std::uint64_t messages_sent() const { return messages_sent_; }
  std::uint64_t bytes_sent() const { return bytes_sent_; }

 private:
  int rank_;
  Mailboxes mailboxes_;
  std::atomic<std::uint64_t> messages_sent_{0};
  std::atomic<std::uint64_t> bytes_sent_{0};
};

/// One for each rank; for channels of a kind derived from LoopbackChannel.
LoopbackChannel::Mailboxes make_loopback_mailboxes(int size);

/// One channel for each rank, connected to each other. They may be used by different threads and
/// destroyed in any order.
std::vector<std::shared_ptr<LoopbackChannel>> make_loopback_channels(int size);

}  // namespace pycomm
