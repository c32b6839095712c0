#pragma once

#include <string>
#include <vector>

#include "core/operation.h"
#include "nccl/communicator.h"
#include "nccl/plane.h"

namespace pycomm::nccl {

/// What NCCL cannot do of `operation`, with the remedy; empty: it can.
std::string unsupported(const Operation& operation);

/// Ask NCCL for `operation` on the device's stream, which must be the current device's: wait for
/// Communicator::Accepted then.
///
/// Reductions are NCCL's own, rounded as NCCL rounds: 16-bit floats at every hop. A divisor and the
/// two factors are multiplied into each input, as one number of its dtype. MIN and MAX of a NaN
/// are what NCCL says. bool is combined as bytes, complex numbers as pairs; what is only moved,
/// moves as bytes. gather, scatter, all_to_all, and an all_gather of different lengths are sends
/// and receives of one NCCL group (exchange_of).
void launch(const Communicator& communicator, const Operation& operation, int rank, int size);

/// The same for a batch of messages with `peer`, in one NCCL group.
void launch(const Communicator& communicator, const std::vector<GpuMessage>& batch, int peer);

}  // namespace pycomm::nccl
