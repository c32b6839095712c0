#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "point_to_point/frame.h"
#include "point_to_point/link.h"
#include "point_to_point/transfer.h"

namespace pycomm {

/// One rank's point-to-point messages in one group: pairs sends with receives and moves their bytes
/// over the links. Used by one thread at a time.
///
/// Messages of one (sender, tag) are received in the order they were posted; a receive from any
/// source takes the message that this rank has seen earliest. No message waits for another one of
/// a different tag or peer: whatever comes is taken off its link at once, and small payloads and
/// descriptors are kept until a receive wants them. See Frame for the protocol and its bounds.
class Exchange {
 public:
  /// @param links  by group rank, this rank's own among them.
  Exchange(int rank, std::vector<Link*> links);

  /// Never waits. @throws MismatchError  as advance().
  void post(std::shared_ptr<Transfer> transfer);

  /// Move what can move. True if something did.
  /// @throws MismatchError  a message and the receive for it differ; the exchange must not be used
  ///         any more.
  bool advance();

  /// Transfers that are done and were not taken yet.
  std::vector<std::shared_ptr<Transfer>> take_done() { return std::exchange(done_, {}); }
  /// All that were posted and are not done.
  std::vector<std::shared_ptr<Transfer>> unfinished() const;
  /// Nothing is posted, and nothing left to tell the peers.
  bool idle() const;
  /// Something is left to tell the peers for which there was no room.
  bool has_unsent() const;
  /// Forget everything: no memory of the transfers is touched any more.
  void clear();

 private:
  using TransferPtr = std::shared_ptr<Transfer>;

  struct Outgoing {
    Frame frame;
    TransferPtr send;  // of a kMessage
  };
  struct Peer {
    Link* link;
    std::deque<Outgoing> outbox;
    std::deque<TransferPtr> streams;                // sends that were asked for, in that order
    std::map<std::uint64_t, TransferPtr> sends;     // announced, not asked for; by id
    std::map<std::uint64_t, TransferPtr> receives;  // asked for; by the sender's id
    std::uint64_t eager_messages = 0;               // sent to the peer and not consumed there
    std::uint64_t eager_consumed = 0;               // from the peer, and it was not told
  };
  struct Arrived {
    int peer;
    Frame frame;
    std::vector<std::byte> payload;
  };

  void take_in(int peer, const Frame& frame, const std::byte* payload);
  /// Give a message to the receive it matches.
  void fulfil(const TransferPtr& receive, int peer, const Frame& frame, const std::byte* payload);
  [[noreturn]] void refuse(const Transfer& receive, int peer, const Frame& frame);
  bool push_outbox(Peer& peer);
  bool push_streams(Peer& peer);
  void finish(const TransferPtr& transfer);
  Peer& at(int peer) { return peers_[static_cast<std::size_t>(peer)]; }

  const int rank_;
  std::vector<Peer> peers_;
  std::list<TransferPtr> posted_;  // receives without a message, oldest first
  std::list<Arrived> unexpected_;  // messages without a receive, oldest first
  std::vector<TransferPtr> done_;
  std::uint64_t next_id_ = 0;
};

}  // namespace pycomm
