#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "point_to_point/frame.h"
#include "point_to_point/gpu_mail.h"
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
  /// @param links    by group rank, this rank's own among them.
  /// @param connect  for messages between GPUs.
  Exchange(int rank, std::vector<Link*> links, GpuMail::Connect connect);

  /// Never waits. @throws MismatchError  as advance().
  void post(std::shared_ptr<Transfer> transfer);

  /// A small message that can leave at once, without a Transfer to keep. False: nothing was done.
  bool send_at_once(const Transfer& transfer);

  /// Take a small message from one given rank if it is the next one there, as post() would. Looks
  /// `looks` times. False: nothing was received.
  bool receive_at_once(const Transfer& transfer, int looks);

  /// Move what can move, at most kCopyBytes from and to each peer's arena. True if something did.
  /// @throws MismatchError  a message and the receive for it differ; the exchange must not be used
  ///         any more.
  bool advance();

  /// The same for what is on GPUs. For the progress thread alone, whose the GPUs are.
  /// @throws CommTimeoutError, PeerLostError, CommError  as advance().
  bool advance_gpus();
  const GpuMail& gpus() const { return gpus_; }
  /// Leave the other ranks' GPUs, once they have come to all that was launched. For the progress
  /// thread.
  void leave_gpus(const std::function<bool()>& given_up) { gpus_.leave(given_up); }
  /// The group is finished: the next advance_gpus() aborts what is on this rank's.
  void give_up_gpus() { gpus_.give_up(); }

  /// Transfers that are done and were not taken yet.
  std::vector<std::shared_ptr<Transfer>> take_done();
  /// All that were posted and are not done.
  std::vector<std::shared_ptr<Transfer>> unfinished() const;
  /// A receive that nobody has to drive before somebody waits for it: its sender writes its slot.
  bool is_left_to_sender(const Transfer& transfer) const;
  /// Nothing else is posted, and nothing left to tell the peers.
  bool idle() const;
  /// Something is left to tell the peers for which there was no room.
  bool has_unsent() const;
  /// Forget everything: no memory of the transfers is touched any more, except by a GPU where that
  /// was launched.
  void clear();

 private:
  using TransferPtr = std::shared_ptr<Transfer>;
  using Transfers = std::map<std::uint64_t, TransferPtr>;  // by id

  /// Who drives an exchange holds a lock: so long a copy keeps others from it, 50 to 100 us.
  static constexpr std::size_t kCopyBytes = 1 << 20;
  /// A large message goes in so many pieces or more, unless they became smaller than kLeastPiece:
  /// the receiver copies one while the sender copies the next.
  static constexpr std::size_t kPieces = 4;
  static constexpr std::size_t kLeastPieceBytes = 16 << 10;

  struct Outgoing {
    Frame frame;
    TransferPtr send;                     // of a kMessage
    std::vector<std::byte> payload = {};  // of others
  };
  struct Reading {
    TransferPtr receive;
    const std::byte* source;
  };
  struct Writing {
    TransferPtr send;
    std::byte* target;
    Frame over;  // tells the receiver
  };
  struct Peer {
    Link* link = nullptr;
    std::deque<Outgoing> outbox = {};
    std::deque<TransferPtr> streams = {};         // sends that were asked for, in that order
    Transfers sends = {};                         // announced, not asked for
    Transfers receives = {};                      // asked for; by the sender's id
    std::deque<Reading> readings = {};            // receives from the peer's arena
    std::deque<Writing> writings = {};            // sends into the peer's arena
    std::map<int, std::deque<Frame>> ready = {};  // its slots that wait for a send; by tag
    std::uint64_t eager_messages = 0;             // sent to the peer and not consumed there
    std::uint64_t eager_consumed = 0;             // from the peer, and it was not told
  };
  struct Arrived {
    int peer;
    Frame frame;
    std::vector<std::byte> payload;
  };

  /// @throws MismatchError  nothing of what a peer says is believed before it was checked.
  void take_in(int peer, const Frame& frame, const std::byte* payload);
  [[noreturn]] void malformed(int from, const char* problem) const;
  /// The message that a peer's frame names.
  TransferPtr take(Transfers& transfers, std::uint64_t id, int from) const;
  /// The memory that it names.
  std::byte* memory_of(int from, std::uint64_t address, std::size_t bytes);
  /// Give a message to the receive it matches.
  void fulfil(const TransferPtr& receive, int peer, const Frame& frame, const std::byte* payload);
  void take_eager(Peer& peer, std::byte* target, const std::byte* payload, std::size_t bytes);
  /// The lower rank has said which messages come next.
  void take_batch(int from, const Frame& frame, const std::byte* payload);
  /// Tell the sender of what this receive waits for where to write it.
  void advertise(const TransferPtr& receive);
  /// A slot of the peer is ready.
  void take_ready(Peer& peer, const Frame& frame);
  /// The slot that waits for this send, if there is one.
  std::optional<Frame> ready_for(Peer& peer, const Transfer& send);
  /// Copy between this rank's memory and the peer's arena.
  bool read_on(Peer& peer, std::size_t& budget);
  bool write_on(Peer& peer, std::size_t& budget);
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
  GpuMail gpus_;
};

}  // namespace pycomm
