#pragma once

#include "nccl/communicator.h"
#include "nccl/exchange.h"

namespace pycomm::nccl {

/// Sends and receives of one NCCL group, on the device's stream. NCCL begins with them
/// asynchronously, so that the host waits until it has taken them, but never for the GPU.
class NcclCarrier final : public Carrier {
 public:
  explicit NcclCarrier(const Communicator& communicator) : communicator_(communicator) {}

  const Device& device() const override { return communicator_.device(); }
  Task<> carry(const Exchange& exchange) override;

 private:
  const Communicator& communicator_;
};

/// Ask NCCL for an exchange: wait for Communicator::Accepted then.
void launch(const Communicator& communicator, const Exchange& exchange);

}  // namespace pycomm::nccl
