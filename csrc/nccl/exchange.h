#pragma once

#include <cstddef>

#include "nccl/communicator.h"
#include "nccl/device.h"

namespace pycomm::nccl {

/// Sends and receives of one NCCL group, on the device's stream. Between two ranks they are paired
/// in their order.
class Exchange {
 public:
  Exchange(const Communicator& communicator, std::size_t element_bytes);
  /// NCCL's group belongs to the thread, which goes on after an error.
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  /// Of no elements: nothing, and so the peer expects nothing.
  void send(int peer, const std::byte* from, std::size_t count);
  void receive(int peer, std::byte* to, std::size_t count);

  /// Hand them to NCCL: wait for Communicator::Accepted then.
  void finish();

 private:
  const Communicator& communicator_;
  const Device::Current current_;
  const NcclTable& nccl_;
  const std::size_t element_bytes_;
  bool finished_ = false;
};

}  // namespace pycomm::nccl
