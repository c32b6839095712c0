#pragma once

#include <memory>

#include "nccl/device.h"
#include "nccl/plane.h"

namespace pycomm::nccl {

/// A group's calls on its ranks' GPUs without NCCL: through host memory, by the collectives of the
/// host, which go through shared memory inside a host and over MPI between hosts. So every dtype
/// and op of the host is there, and sums have the host's order and the host's bits.
///
/// A tensor goes in pieces (pieces.h) through three slots of pinned memory, so that three pieces
/// are on their way at once:
///
///   stream down    copy 0 | copy 1       | copy 2       | copy 3       |
///   host                  | collective 0 | collective 1 | collective 2 | collective 3
///   stream up                            | copy 0       | copy 1       | copy 2 ...
///
/// The GPU waits for events and the progress thread looks at events: no thread is ever blocked. An
/// operation is over when its last copy up was put on the stream, for the collectives need the
/// host: unlike a call of NCCL it is over only when the GPU has come to its tensors.
///
/// Cost beside the host's collective of the same size: the copy of a piece in each direction, and
/// the agreement on each piece. Memory: three slots in each rank's arena, from the first call on.
std::unique_ptr<GpuGroup> make_staged_group(std::shared_ptr<Device> device);

}  // namespace pycomm::nccl
