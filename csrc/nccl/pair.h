#pragma once

#include <memory>

#include "nccl/device.h"
#include "nccl/plane.h"

namespace pycomm::nccl {

/// A communicator of two ranks, made with the first message: NCCL has one for all ranks of a group
/// only after a collective of the whole group, and messages must not wait for that.
std::unique_ptr<GpuPair> make_nccl_pair(std::shared_ptr<Device> device, const Pairing& pairing);

}  // namespace pycomm::nccl
