#pragma once

#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "point_to_point/link.h"
#include "transport/arena.h"
#include "transport/channel.h"

namespace pycomm {

/// Carries one group's frames between hosts: each is one message of the channel, frame and payload
/// together, in a parcel of its own. push() only packs a parcel; the channel is called by poll()
/// alone, which is for the progress thread.
class Courier {
 public:
  using Allocate = std::function<std::shared_ptr<ArenaBlock>(std::size_t)>;
  using Quarantine = std::function<void(std::shared_ptr<ArenaBlock>)>;

  static constexpr std::size_t kPieceBytes = 64 << 10;
  /// Parcels under way: to one peer, so that a slow one leaves room for others; to all; from all.
  /// Together at most 1.25 MiB.
  static constexpr int kMostToOnePeer = 4;
  static constexpr std::size_t kMostSent = 12;
  static constexpr std::size_t kMostArriving = 8;

  /// @param tag         of the channel, for this group's frames alone.
  /// @param quarantine  keeps memory that the channel may still touch.
  Courier(Channel& channel, int tag, Allocate allocate, Quarantine quarantine);
  ~Courier();
  Courier(const Courier&) = delete;
  Courier& operator=(const Courier&) = delete;

  /// The link to a rank of another host; valid as long as the courier.
  Link& link_to(int world_rank);

  /// Send what was packed, receive what has come. True if something moved.
  /// @throws PeerLostError, CommError  of one parcel, which is given up; all others have moved on.
  bool poll();
  /// Whether everything packed has left its memory.
  bool idle() const { return packed_.empty() && sent_.empty(); }

 private:
  class RemoteLink;
  struct Parcel {
    int peer;
    std::size_t bytes;
    std::shared_ptr<ArenaBlock> memory;
    std::unique_ptr<Message> message;  // null: not sent yet, or it has failed, and memory is gone
  };

  bool pack(int peer, const Frame& frame, std::span<const std::byte> payload);
  bool receive();
  bool post(Parcel parcel);
  /// Whether its message has left, or come, or has failed: that is kept for the end of poll().
  bool is_over(Parcel& parcel);
  std::shared_ptr<ArenaBlock> take_memory();

  Channel& channel_;
  const int tag_;
  const Allocate allocate_;
  const Quarantine quarantine_;
  std::map<int, std::unique_ptr<RemoteLink>> links_;  // by world rank
  std::deque<Parcel> packed_;
  std::vector<Parcel> sent_;
  std::deque<Parcel> arriving_;
  std::map<int, int> to_peer_;  // packed or sent
  std::vector<std::shared_ptr<ArenaBlock>> spare_;
  std::exception_ptr failure_;  // the first one of this poll()
};

}  // namespace pycomm
