#pragma once

#include <cstddef>
#include <vector>

#include "core/operation.h"
#include "core/task.h"
#include "nccl/device.h"

namespace pycomm::nccl {

/// Messages between the GPUs of a group that are on their way at the same time. Between two ranks
/// they are paired in their order, a rank and itself among them.
class Exchange {
 public:
  struct Message {
    bool sends;
    int peer;
    std::byte* memory;  // only read by a send
    std::size_t bytes;
  };

  explicit Exchange(std::size_t element_bytes = 1) : element_bytes_(element_bytes) {}

  /// Of no elements: nothing, and so the peer expects nothing.
  void send(int peer, const std::byte* from, std::size_t count) {
    add({true, peer, const_cast<std::byte*>(from), count * element_bytes_});
  }
  void receive(int peer, std::byte* to, std::size_t count) {
    add({false, peer, to, count * element_bytes_});
  }

  const std::vector<Message>& messages() const { return messages_; }

 private:
  void add(const Message& message) {
    if (message.bytes > 0) messages_.push_back(message);
  }

  const std::size_t element_bytes_;
  std::vector<Message> messages_;
};

/// A gather, scatter, all-to-all, or an all-gather of any lengths: every block straight from its
/// rank to whoever wants it.
Exchange exchange_of(const Operation& operation, int rank, int size);

/// What moves the bytes of exchanges between the GPUs of a group, or of a pair.
class Carrier {
 public:
  virtual ~Carrier() = default;

  virtual const Device& device() const = 0;

  /// In the order of the device's stream: the messages carry what the work on it before them has
  /// written, and the work behind them finds what they have brought. Over once that is certain,
  /// which may be before they have moved.
  virtual Task<> carry(const Exchange& exchange) = 0;
};

}  // namespace pycomm::nccl
