#include "nccl/mpi_carrier.h"

#include <cstddef>
#include <deque>
#include <string>
#include <utility>

namespace pycomm::nccl {
namespace {

/// Waits until all messages are over. MPI works on the thread's current GPU.
class AllOver final : public Wait {
 public:
  using Messages = std::vector<std::unique_ptr<Message>>;

  AllOver(const Device& device, Messages messages)
      : device_(device), messages_(std::move(messages)) {}

  bool poll() override {
    const Device::Current current(device_);
    std::erase_if(messages_, [](const auto& message) { return message->poll(); });
    return messages_.empty();
  }
  std::string describe() const override { return messages_.front()->describe(); }
  bool rings_doorbell() const override { return false; }

 private:
  const Device& device_;
  Messages messages_;
};

}  // namespace

Task<> MpiCarrier::carry(const Exchange& exchange) {
  copy_own(exchange);
  // What is on the stream may still write what is sent, and read what lies where a message comes.
  Event before(device_);
  before.record(device_->stream);
  Passed passed(before, "this rank's GPU to come to what MPI is to move");
  co_await until(passed);
  AllOver::Messages messages;
  {
    const Device::Current current(*device_);
    for (const auto& [sends, peer, memory, bytes] : exchange.messages()) {
      if (peer == rank_) continue;
      const int other = world_ranks_[static_cast<std::size_t>(peer)];
      messages.push_back(sends ? channel_.send(other, tag_, {memory, bytes})
                               : channel_.receive(other, tag_, {memory, bytes}));
    }
  }
  AllOver over(*device_, std::move(messages));
  co_await until(over);
}

void MpiCarrier::copy_own(const Exchange& exchange) {
  const Device::Current current(*device_);
  std::deque<const Exchange::Message*> sent;
  for (const Exchange::Message& message : exchange.messages()) {
    if (message.peer == rank_ && message.sends) sent.push_back(&message);
  }
  for (const Exchange::Message& message : exchange.messages()) {
    if (message.peer != rank_ || message.sends) continue;
    const std::byte* const from = sent.front()->memory;
    sent.pop_front();
    if (from == message.memory) continue;
    device_->cuda.check(device_->cuda.cudaMemcpyAsync(message.memory, from, message.bytes,
                                                      cudaMemcpyDeviceToDevice, device_->stream),
                        "cudaMemcpyAsync");
  }
}

}  // namespace pycomm::nccl
