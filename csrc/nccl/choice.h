#pragma once

#include <functional>
#include <memory>

#include "nccl/device.h"
#include "nccl/mpi_answer.h"
#include "nccl/plane.h"

namespace pycomm::nccl {

using MakeGroup = std::function<std::unique_ptr<GpuGroup>()>;

/// A group whose ranks agree in their first call on GPUs what carries that and all later ones: NCCL
/// if every rank has one; if no rank has, MPI from GPU memory, where the group is on several hosts
/// and the MPI of every rank takes that; else staging. They tell each other what they lack, so all
/// choose alike, and none falls back behind the others' backs; the group's first rank says why.
///
/// So a process never has MPI and NCCL work on its GPU at the same time, where each might wait for
/// what the other holds. Ranks whose NCCLs differ have one each, so they get NCCL's refusal.
///
/// Cost: the first call is opened twice, so that a mismatch names it and not the choice.
///
/// @param transport  kAuto, or kMpi: never NCCL, and an error where MPI takes no GPU memory.
/// @param make_nccl  makes the group on NCCL.
std::unique_ptr<GpuGroup> make_choosing_group(std::shared_ptr<Device> device, Transport transport,
                                              std::shared_ptr<MpiAnswer> mpi, MakeGroup make_nccl);

/// A pair of ranks that agree in their first batch what carries their messages: NCCL if both have
/// one, else staging. A rank without an NCCL says why.
std::unique_ptr<GpuPair> make_choosing_pair(std::shared_ptr<Device> device, const Pairing& pairing);

}  // namespace pycomm::nccl
