#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "double/gpu.h"
#include "forwarding_channel.h"
#include "transport/channel_loopback.h"

/// A stand-in for an MPI that takes pointers to GPU memory: a loopback channel that reaches the
/// double's. It knows no streams: what it sends is what lies there when send() is called, and what
/// it receives lies there once a poll says so. It counts what it sends from GPUs
/// (gpu_double::sent).
class GpuAwareChannel final : public ForwardingChannel {
 public:
  using ForwardingChannel::ForwardingChannel;

  std::unique_ptr<pycomm::Message> send(int peer, int tag,
                                        std::span<const std::byte> bytes) override {
    if (!is_on_gpu(bytes.data())) return ForwardingChannel::send(peer, tag, bytes);
    std::unique_ptr<pycomm::Message> message;
    gpu_double::count_sent(rank(), peer, bytes.size());
    gpu_double::change([&] {
      const auto* const from = static_cast<const std::byte*>(gpu_double::reachable(bytes.data()));
      message = ForwardingChannel::send(peer, tag, {from, bytes.size()});
    });
    return message;
  }
  std::unique_ptr<pycomm::Message> receive(int peer, int tag, std::span<std::byte> bytes) override {
    if (!is_on_gpu(bytes.data())) return ForwardingChannel::receive(peer, tag, bytes);
    auto* const to = static_cast<std::byte*>(gpu_double::reachable(bytes.data()));
    return std::make_unique<BetweenSteps>(
        ForwardingChannel::receive(peer, tag, {to, bytes.size()}));
  }

 private:
  /// Writes while no stream moves, so that only the order of the two counts.
  class BetweenSteps final : public pycomm::Message {
   public:
    explicit BetweenSteps(std::unique_ptr<pycomm::Message> message)
        : message_(std::move(message)) {}
    bool poll() override {
      bool over = false;
      gpu_double::change([&] { over = message_->poll(); });
      return over;
    }
    std::string describe() const override { return message_->describe(); }

   private:
    const std::unique_ptr<pycomm::Message> message_;
  };

  static bool is_on_gpu(const std::byte* memory) {
    return gpu_double::memory_offset(memory).has_value();
  }
};

inline std::vector<std::shared_ptr<pycomm::Channel>> gpu_aware_channels(std::size_t size) {
  std::vector<std::shared_ptr<pycomm::Channel>> channels;
  for (auto& channel : pycomm::make_loopback_channels(static_cast<int>(size))) {
    channels.push_back(std::make_shared<GpuAwareChannel>(std::move(channel)));
  }
  return channels;
}
