#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>

#include "collectives/context.h"
#include "core/task.h"

namespace pycomm {

/// The messages of one lane between the hosts, in the order in which an algorithm asks for them, a
/// few at a time: at most `kWindow` each way are with the channel, so that the wire has the next
/// message when one ends.
///
/// A send may be told to wait for a receive. By that a host that goes through its peers in rounds
/// keeps step with them: a receiver has one sender, two for a moment at the turn of a round. (All
/// at once, TCP loses segments to full queues, waits for its timer, and 30 % of the wire is lost.)
///
/// send() and receive() never block. Messages move while somebody waits on the stream; whoever
/// waits for something else meanwhile uses While. Tickets count up from 1, separately for each
/// direction; messages end in that order.
class LaneStream {
 public:
  using Ticket = std::uint64_t;

  /// Messages with the channel in each direction.
  static constexpr std::size_t kWindow = 8;

  explicit LaneStream(Lane lane) : lane_(std::move(lane)) {}

  const Lane& lane() const { return lane_; }

  /// The bytes stay as they are until the send is over, in memory as Channel demands it.
  /// @param after  a receive that must be over first; 0: none.
  Ticket send(int to_host, std::span<const std::byte> bytes, Ticket after = 0);
  Ticket receive(int from_host, std::span<std::byte> bytes);

  /// The ticket of the last send, and of the last receive, so far.
  Ticket last_send() const { return sends_.finished + sends_.backlog(); }
  Ticket last_receive() const { return receives_.finished + receives_.backlog(); }

  /// `co_await until(wait)`: every message up to both tickets is over.
  class Over : public Wait {
   public:
    Over(LaneStream& stream, Ticket sends, Ticket receives)
        : stream_(stream), sends_(sends), receives_(receives) {}
    bool poll() override;
    std::string describe() const override;
    bool rings_doorbell() const override { return false; }

   private:
    LaneStream& stream_;
    const Ticket sends_;
    const Ticket receives_;
  };
  Over received(Ticket ticket) { return {*this, 0, ticket}; }
  Over all_over() { return {*this, last_send(), last_receive()}; }

  /// `co_await until(wait)`: waits for `other`, and the messages move meanwhile.
  class While : public Wait {
   public:
    While(LaneStream& stream, Wait& other) : stream_(stream), other_(other) {}
    bool poll() override;
    std::string describe() const override { return other_.describe(); }
    bool rings_doorbell() const override;

   private:
    LaneStream& stream_;
    Wait& other_;
  };

 private:
  template <typename Bytes>
  struct Direction {
    struct Entry {
      int host;
      Bytes bytes;
      Ticket after;  // begins once this receive is over
    };
    Ticket finished = 0;
    std::deque<std::unique_ptr<Message>> active;  // with the channel, oldest first
    std::deque<Entry> queued;

    std::size_t backlog() const { return active.size() + queued.size(); }

    template <typename Post>
    void move(Ticket arrived, const Post& post) {
      for (;;) {
        while (active.size() < kWindow && !queued.empty() && queued.front().after <= arrived) {
          active.push_back(post(queued.front().host, queued.front().bytes));
          queued.pop_front();
        }
        if (active.empty() || !active.front()->poll()) return;
        active.pop_front();
        ++finished;
      }
    }
  };

  /// Move along what can move.
  void move();

  const Lane lane_;
  Direction<std::span<const std::byte>> sends_;
  Direction<std::span<std::byte>> receives_;
};

}  // namespace pycomm
