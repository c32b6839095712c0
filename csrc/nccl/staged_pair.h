#pragma once

#include <memory>

#include "nccl/device.h"
#include "nccl/plane.h"

namespace pycomm::nccl {

/// The messages of two ranks' GPUs without NCCL: in pieces, through three slots of pinned memory at
/// each end and the group's messages between hosts' memory. Both ends cut a batch into the same
/// pieces in the same order, those in the one direction and in the other, and have three under way
/// at once:
///
///   a send      copy down, then the host's send; its slot is free once that has left it
///   a receive   the host's receive, posted when its slot is free; then the copy up
///
/// As both ends come to the pieces in one order, and wait only for pieces that come before, no
/// order of messages can make them wait for each other. A message to oneself is one copy.
///
/// Cost beside the host's message of the same size: the copy of a piece at each end. Unlike one on
/// NCCL, a message is over only when the GPU has come to its tensor.
std::unique_ptr<GpuPair> make_staged_pair(std::shared_ptr<Device> device, const Pairing& pairing);

}  // namespace pycomm::nccl
