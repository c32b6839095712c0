#include "nccl/nccl_carrier.h"

namespace pycomm::nccl {
namespace {

/// NCCL's group belongs to the thread, which goes on after an error.
class NcclGroupCall {
 public:
  explicit NcclGroupCall(const Communicator& communicator)
      : communicator_(communicator), nccl_(*communicator.device().nccl) {
    communicator_.check(nccl_.ncclGroupStart(), "ncclGroupStart");
  }
  ~NcclGroupCall() {
    if (!ended_) nccl_.ncclGroupEnd();
  }
  NcclGroupCall(const NcclGroupCall&) = delete;
  NcclGroupCall& operator=(const NcclGroupCall&) = delete;

  void end() {
    ended_ = true;
    communicator_.check(nccl_.ncclGroupEnd(), "ncclGroupEnd");
  }

 private:
  const Communicator& communicator_;
  const NcclTable& nccl_;
  bool ended_ = false;
};

}  // namespace

void launch(const Communicator& communicator, const Exchange& exchange) {
  const Device& device = communicator.device();
  const NcclTable& nccl = *device.nccl;
  const Device::Current current(device);
  NcclGroupCall group(communicator);
  for (const Exchange::Message& message : exchange.messages()) {
    if (message.sends) {
      communicator.check(nccl.ncclSend(message.memory, message.bytes, ncclUint8, message.peer,
                                       communicator.handle(), device.stream),
                         "ncclSend");
    } else {
      communicator.check(nccl.ncclRecv(message.memory, message.bytes, ncclUint8, message.peer,
                                       communicator.handle(), device.stream),
                         "ncclRecv");
    }
  }
  group.end();
}

Task<> NcclCarrier::carry(const Exchange& exchange) {
  launch(communicator_, exchange);
  Communicator::Accepted accepted(communicator_);
  co_await until(accepted);
}

}  // namespace pycomm::nccl
