#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "forwarding_channel.h"
#include "transport/channel_loopback.h"

/// A channel between pretend hosts whose cables can be pulled: what is sent over a cut one is lost,
/// and its sender is not told, as with TCP for minutes.
class CuttableChannel final : public ForwardingChannel {
 public:
  struct Cables {
    explicit Cables(std::vector<int> hosts) : host_of(std::move(hosts)), is_cut(host_of.size()) {}
    void cut(int host) { is_cut.at(static_cast<std::size_t>(host)).store(true); }

    const std::vector<int> host_of;         // by rank
    std::vector<std::atomic<bool>> is_cut;  // by host
  };

  CuttableChannel(std::shared_ptr<pycomm::Channel> channel, std::shared_ptr<Cables> cables)
      : ForwardingChannel(std::move(channel)), cables_(std::move(cables)) {}

  std::unique_ptr<pycomm::Message> send(int peer, int tag,
                                        std::span<const std::byte> bytes) override {
    if (reaches(peer)) return ForwardingChannel::send(peer, tag, bytes);
    return std::make_unique<Lost>();
  }

 private:
  /// It has left its buffer.
  class Lost final : public pycomm::Message {
   public:
    bool poll() override { return true; }
    std::string describe() const override { return "a message over a cut cable"; }
  };

  bool reaches(int peer) const {
    const int here = cables_->host_of.at(static_cast<std::size_t>(rank()));
    const int there = cables_->host_of.at(static_cast<std::size_t>(peer));
    const auto cut = [&](int host) {
      return cables_->is_cut.at(static_cast<std::size_t>(host)).load();
    };
    return here == there || (!cut(here) && !cut(there));
  }

  const std::shared_ptr<Cables> cables_;
};

inline std::vector<std::shared_ptr<pycomm::Channel>> cuttable_channels(
    const std::shared_ptr<CuttableChannel::Cables>& cables) {
  std::vector<std::shared_ptr<pycomm::Channel>> channels;
  for (auto& channel : pycomm::make_loopback_channels(static_cast<int>(cables->host_of.size()))) {
    channels.push_back(std::make_shared<CuttableChannel>(std::move(channel), cables));
  }
  return channels;
}
