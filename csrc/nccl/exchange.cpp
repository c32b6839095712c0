#include "nccl/exchange.h"

namespace pycomm::nccl {

Exchange::Exchange(const Communicator& communicator, std::size_t element_bytes)
    : communicator_(communicator),
      current_(communicator.device()),
      nccl_(*communicator.device().nccl),
      element_bytes_(element_bytes) {
  communicator_.check(nccl_.ncclGroupStart(), "ncclGroupStart");
}

Exchange::~Exchange() {
  if (!finished_) nccl_.ncclGroupEnd();
}

void Exchange::send(int peer, const std::byte* from, std::size_t count) {
  if (count == 0) return;
  communicator_.check(nccl_.ncclSend(from, count * element_bytes_, ncclUint8, peer,
                                     communicator_.handle(), communicator_.device().stream),
                      "ncclSend");
}

void Exchange::receive(int peer, std::byte* to, std::size_t count) {
  if (count == 0) return;
  communicator_.check(nccl_.ncclRecv(to, count * element_bytes_, ncclUint8, peer,
                                     communicator_.handle(), communicator_.device().stream),
                      "ncclRecv");
}

void Exchange::finish() {
  finished_ = true;
  communicator_.check(nccl_.ncclGroupEnd(), "ncclGroupEnd");
}

}  // namespace pycomm::nccl
