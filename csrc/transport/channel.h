#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/task.h"

namespace pycomm {

/// A message in flight: `co_await until(*message)` returns once it has arrived or left its buffer.
/// Destroying an unfinished message withdraws it; its buffer must then stay mapped until the
/// channel itself is destroyed, because the network may still touch it.
class Message : public Wait {
 public:
  bool rings_doorbell() const override { return false; }
};

/// Point-to-point messages between hosts: MPI, or mailboxes in one process for tests.
///
/// Messages of one (sender, receiver, tag) arrive in the order they were sent. Both calls return at
/// once. Only one thread at a time may use a channel and poll its messages.
class Channel {
 public:
  /// For what the processes tell each other beside the data; groups use those above.
  static constexpr int kControlTag = 0;
  /// What the text of an error of the network begins with; it knows of no call.
  static constexpr const char* kFailure = "MPI failed";

  virtual ~Channel() = default;

  /// Of all ranks, by rank, for errors; before any message.
  void name_hosts(std::vector<std::string> hosts) { hosts_ = std::move(hosts); }

  /// "rank 3 on host 'b'", once hosts have names.
  std::string name_of(int peer) const {
    const std::string name = "rank " + std::to_string(peer);
    return hosts_.empty() ? name
                          : name + " on host '" + hosts_[static_cast<std::size_t>(peer)] + "'";
  }

  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// @param peer    rank of the receiver in the world.
  /// @param bytes   at most 2^31-1; unchanged until the message is over.
  /// @throws PeerLostError
  virtual std::unique_ptr<Message> send(int peer, int tag, std::span<const std::byte> bytes) = 0;

  /// Move along what has left its buffer but not yet this host. Cheap; for a progress thread that
  /// has no message to poll.
  virtual void progress() = 0;

  /// The memory stays as it is until the message has come: who sends only once it has got what lies
  /// there may send to it.
  /// @param bytes   exactly as long as what the peer sends; a longer message is a MismatchError.
  virtual std::unique_ptr<Message> receive(int peer, int tag, std::span<std::byte> bytes) = 0;

  /// The same for a message that may be shorter than `room`.
  /// @param length  set when the message is over; outlives it.
  virtual std::unique_ptr<Message> receive_at_most(int peer, int tag, std::span<std::byte> room,
                                                   std::size_t& length) = 0;

  struct Incoming {
    int peer;
    std::size_t bytes;
  };
  /// The earliest message of `tag` from any rank that has come and that no receive has taken (once
  /// MPI knows a rank to be gone: of the next rank that has one). A receive takes its message at
  /// its first poll. That a rank is gone is no error here: others may still send.
  virtual std::optional<Incoming> probe(int tag) = 0;

 private:
  std::vector<std::string> hosts_;
};

}  // namespace pycomm
