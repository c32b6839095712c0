#pragma once

#include <cstddef>
#include <memory>
#include <optional>

#include "nccl/device.h"
#include "nccl/plane.h"

namespace pycomm::nccl {

/// That all ranks of a group have an MPI that takes pointers to GPU memory.
struct GpuAwareMpi {
  /// Of each GPU, for reductions; 0: some rank has no kernels for them.
  std::size_t scratch_bytes;
};

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
/// Where MPI takes pointers to GPU memory, the slots lie on the GPU, what is a collective of the
/// host above is run_carried() by MPI, and nothing passes through the host; the bits are the same.
/// Only reductions that our kernels do not know (integers) still go through the host.
///
/// Cost beside the collective of the same size: the copy of a piece in each direction; through the
/// host also the agreement on each piece. Memory: three slots, in each rank's arena or on its GPU,
/// from the first call on; on the GPU the scratch beside them.
///
/// @param mpi  of a group on several hosts; the same on all its ranks.
std::unique_ptr<GpuGroup> make_staged_group(std::shared_ptr<Device> device,
                                            std::optional<GpuAwareMpi> mpi = std::nullopt);

}  // namespace pycomm::nccl
