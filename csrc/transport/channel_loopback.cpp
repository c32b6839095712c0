#include "transport/channel_loopback.h"

#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "core/error.h"

namespace pycomm {

/// Everything that was sent to one rank and not yet received, and every receive still waiting.
class LoopbackMailbox {
 public:
  using Letter = std::vector<std::byte>;

  /// Where a receive's message is put, by the thread that sends it if the receive came first.
  struct Slot {
    std::optional<Letter> letter;  // guarded by the mailbox's mutex
  };

  void deliver(int sender, int tag, Letter letter) {
    std::scoped_lock lock(mutex_);
    Lane& lane = lanes_[{sender, tag}];
    if (lane.waiting.empty()) {
      lane.letters.push_back({std::move(letter), ++letters_delivered_});
    } else {
      lane.waiting.front()->letter = std::move(letter);
      lane.waiting.pop_front();
    }
  }

  void await(int sender, int tag, Slot* slot) {
    std::scoped_lock lock(mutex_);
    Lane& lane = lanes_[{sender, tag}];
    if (lane.letters.empty()) {
      lane.waiting.push_back(slot);
    } else {
      slot->letter = std::move(lane.letters.front().letter);
      lane.letters.pop_front();
    }
  }

  void withdraw(int sender, int tag, Slot* slot) {
    std::scoped_lock lock(mutex_);
    std::erase(lanes_[{sender, tag}].waiting, slot);
  }

  std::optional<Channel::Incoming> earliest(int tag) {
    std::scoped_lock lock(mutex_);
    std::optional<Channel::Incoming> found;
    std::uint64_t number = ~std::uint64_t{0};
    for (const auto& [key, lane] : lanes_) {
      if (key.second != tag || lane.letters.empty()) continue;
      const Numbered& first = lane.letters.front();
      if (first.number > number) continue;
      number = first.number;
      found = {key.first, first.letter.size()};
    }
    return found;
  }

  std::optional<Letter> take(Slot& slot) {
    std::scoped_lock lock(mutex_);
    return std::exchange(slot.letter, std::nullopt);
  }

 private:
  struct Numbered {
    Letter letter;
    std::uint64_t number;  // by arrival
  };
  /// One (sender, tag), oldest first. At most one of the two queues has entries.
  struct Lane {
    std::deque<Numbered> letters;
    std::deque<Slot*> waiting;
  };

  std::mutex mutex_;
  std::map<std::pair<int, int>, Lane> lanes_;
  std::uint64_t letters_delivered_ = 0;
};

namespace {

/// Over from the start: the bytes were copied by send().
class LoopbackSend : public Message {
 public:
  LoopbackSend(int peer, int tag) : peer_(peer), tag_(tag) {}
  bool poll() override { return true; }
  std::string describe() const override {
    return "rank " + std::to_string(peer_) + " to take a message (tag " + std::to_string(tag_) +
           ")";
  }

 private:
  int peer_;
  int tag_;
};

class LoopbackReceive : public Message {
 public:
  /// @param length  null: the message is as long as `bytes`.
  LoopbackReceive(std::shared_ptr<LoopbackMailbox> mailbox, int peer, int tag,
                  std::span<std::byte> bytes, std::size_t* length)
      : mailbox_(std::move(mailbox)), peer_(peer), tag_(tag), bytes_(bytes), length_(length) {
    mailbox_->await(peer_, tag_, &slot_);
  }
  ~LoopbackReceive() override {
    if (!done_) mailbox_->withdraw(peer_, tag_, &slot_);
  }
  LoopbackReceive(const LoopbackReceive&) = delete;
  LoopbackReceive& operator=(const LoopbackReceive&) = delete;

  bool poll() override {
    if (done_) return true;
    const auto letter = mailbox_->take(slot_);
    if (!letter) return false;
    done_ = true;
    const bool fits =
        length_ != nullptr ? letter->size() <= bytes_.size() : letter->size() == bytes_.size();
    if (!fits) {
      throw MismatchError("rank " + std::to_string(peer_) + " sent " +
                          std::to_string(letter->size()) + " bytes (tag " + std::to_string(tag_) +
                          ") where " + std::to_string(bytes_.size()) +
                          " were expected.\n  Every rank must issue the same collectives in the "
                          "same order.");
    }
    // An empty span may have no address, which memcpy does not allow.
    if (!letter->empty()) std::memcpy(bytes_.data(), letter->data(), letter->size());
    if (length_ != nullptr) *length_ = letter->size();
    return true;
  }

  std::string describe() const override {
    return "rank " + std::to_string(peer_) + " to send " + (length_ != nullptr ? "up to " : "") +
           std::to_string(bytes_.size()) + " bytes (tag " + std::to_string(tag_) + ")";
  }

 private:
  std::shared_ptr<LoopbackMailbox> mailbox_;
  int peer_;
  int tag_;
  std::span<std::byte> bytes_;
  std::size_t* length_;
  LoopbackMailbox::Slot slot_;
  bool done_ = false;
};

}  // namespace

LoopbackChannel::LoopbackChannel(int rank, Mailboxes mailboxes)
    : rank_(rank), mailboxes_(std::move(mailboxes)) {}

std::unique_ptr<Message> LoopbackChannel::send(int peer, int tag,
                                               std::span<const std::byte> bytes) {
  mailboxes_.at(peer)->deliver(rank_, tag, {bytes.begin(), bytes.end()});
  if (tag != kControlTag) {
    ++messages_sent_;
    bytes_sent_ += bytes.size();
  }
  return std::make_unique<LoopbackSend>(peer, tag);
}

std::unique_ptr<Message> LoopbackChannel::receive(int peer, int tag, std::span<std::byte> bytes) {
  return std::make_unique<LoopbackReceive>(mailboxes_.at(rank_), peer, tag, bytes, nullptr);
}

std::unique_ptr<Message> LoopbackChannel::receive_at_most(int peer, int tag,
                                                          std::span<std::byte> room,
                                                          std::size_t& length) {
  return std::make_unique<LoopbackReceive>(mailboxes_.at(rank_), peer, tag, room, &length);
}

std::optional<Channel::Incoming> LoopbackChannel::probe(int tag) {
  return mailboxes_.at(rank_)->earliest(tag);
}

LoopbackChannel::Mailboxes make_loopback_mailboxes(int size) {
  LoopbackChannel::Mailboxes mailboxes;
  for (int rank = 0; rank < size; ++rank) mailboxes.push_back(std::make_shared<LoopbackMailbox>());
  return mailboxes;
}

std::vector<std::shared_ptr<LoopbackChannel>> make_loopback_channels(int size) {
  const LoopbackChannel::Mailboxes mailboxes = make_loopback_mailboxes(size);
  std::vector<std::shared_ptr<LoopbackChannel>> channels;
  for (int rank = 0; rank < size; ++rank) {
    channels.push_back(std::make_shared<LoopbackChannel>(rank, mailboxes));
  }
  return channels;
}

}  // namespace pycomm
