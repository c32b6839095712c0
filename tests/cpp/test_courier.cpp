// Frames between hosts where a peer dies: nobody else's are lost, and no memory is used twice.

#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "forwarding_channel.h"
#include "point_to_point/courier.h"
#include "transport/channel_loopback.h"

namespace {

using pycomm::Arena;
using pycomm::ArenaBlock;
using pycomm::Courier;
using pycomm::Frame;
using pycomm::Link;

constexpr int kTag = 7;
constexpr int kLives = 1;
constexpr int kDies = 2;

/// Every message from or to a rank that has died fails when somebody looks at it.
class DeadPeerChannel final : public ForwardingChannel {
 public:
  using ForwardingChannel::ForwardingChannel;

  std::unique_ptr<pycomm::Message> send(int peer, int tag,
                                        std::span<const std::byte> bytes) override {
    if (peer == kDies) return std::make_unique<Failed>();
    return ForwardingChannel::send(peer, tag, bytes);
  }
  std::unique_ptr<pycomm::Message> receive(int peer, int tag, std::span<std::byte> bytes) override {
    auto message = ForwardingChannel::receive(peer, tag, bytes);
    if (peer != kDies) return message;
    message->poll();  // so that probe() finds the next one
    return std::make_unique<Failed>();
  }

 private:
  class Failed final : public pycomm::Message {
   public:
    bool poll() override { throw pycomm::PeerLostError("rank 2 is gone"); }
    std::string describe() const override { return "a message of a dead rank"; }
  };
};

struct Fixture {
  std::vector<std::shared_ptr<pycomm::LoopbackChannel>> channels =
      pycomm::make_loopback_channels(3);
  std::shared_ptr<Arena> arena = Arena::create(std::size_t{16} << 20);
  std::vector<std::shared_ptr<ArenaBlock>> quarantined;
  DeadPeerChannel channel{channels[0]};
  Courier courier{channel, kTag, [this](std::size_t bytes) { return arena->allocate(bytes); },
                  [this](std::shared_ptr<ArenaBlock> memory) {
                    CHECK(memory != nullptr);
                    quarantined.push_back(std::move(memory));
                  }};
  Link& lives = courier.link_to(kLives);
  Link& dies = courier.link_to(kDies);

  /// A frame from `peer` on its way to the courier.
  void send_from(int peer, std::uint64_t id) {
    Frame frame{};
    frame.id = id;
    const auto bytes = std::as_bytes(std::span(&frame, 1));
    const auto message = channels[static_cast<std::size_t>(peer)]->send(0, kTag, bytes);
    while (!message->poll()) continue;
  }
};

}  // namespace

TEST(frames_of_others_arrive_beside_one_of_a_dead_rank) {
  Fixture here;
  here.send_from(kLives, 1);
  here.send_from(kDies, 2);
  here.send_from(kLives, 3);
  CHECK_THROWS(here.courier.poll(), pycomm::PeerLostError, "rank 2 is gone");
  CHECK_EQUAL(here.quarantined.size(), std::size_t{1});
  for (int i = 0; i < 3; ++i) here.courier.poll();
  for (const std::uint64_t id : {1, 3}) {
    const Frame* const frame = here.lives.front();
    CHECK(frame != nullptr);
    CHECK_EQUAL(frame->id, id);
    here.lives.pop();
  }
  CHECK(here.lives.front() == nullptr);
  CHECK(here.dies.front() == nullptr);
}

TEST(frames_to_others_leave_beside_one_to_a_dead_rank) {
  Fixture here;
  CHECK(here.lives.push({}, {}));
  CHECK(here.dies.push({}, {}));
  CHECK(here.lives.push({}, {}));
  CHECK_THROWS(here.courier.poll(), pycomm::PeerLostError, "rank 2 is gone");
  here.courier.poll();
  CHECK(here.courier.idle());
  CHECK_EQUAL(here.quarantined.size(), std::size_t{1});
  for (int i = 0; i < 20; ++i) {  // with the memory of those before
    CHECK(here.lives.push({}, {}));
    here.courier.poll();
  }
}
