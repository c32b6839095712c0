#pragma once

#include <memory>
#include <utility>

#include "transport/channel.h"

/// Another channel, for tests that change one thing of it.
class ForwardingChannel : public pycomm::Channel {
 public:
  explicit ForwardingChannel(std::shared_ptr<pycomm::Channel> channel)
      : channel_(std::move(channel)) {}

  int rank() const override { return channel_->rank(); }
  int size() const override { return channel_->size(); }
  void progress() override { channel_->progress(); }
  std::optional<Incoming> probe(int tag) override { return channel_->probe(tag); }
  std::unique_ptr<pycomm::Message> send(int peer, int tag,
                                        std::span<const std::byte> bytes) override {
    return channel_->send(peer, tag, bytes);
  }
  std::unique_ptr<pycomm::Message> receive(int peer, int tag, std::span<std::byte> bytes) override {
    return channel_->receive(peer, tag, bytes);
  }
  std::unique_ptr<pycomm::Message> receive_at_most(int peer, int tag, std::span<std::byte> room,
                                                   std::size_t& length) override {
    return channel_->receive_at_most(peer, tag, room, length);
  }

 private:
  const std::shared_ptr<pycomm::Channel> channel_;
};
