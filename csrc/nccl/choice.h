#pragma once

#include <functional>
#include <memory>

#include "nccl/device.h"
#include "nccl/plane.h"

namespace pycomm::nccl {

/// A group whose ranks agree in their first call on GPUs what carries that and all later ones: NCCL
/// if every rank has one, else staging. They tell each other what they lack, so all choose alike,
/// and none falls back behind the others' backs; the group's first rank says why.
///
/// Ranks whose NCCLs differ have one each, so they get NCCL's refusal.
///
/// Cost: the first call is opened twice, so that a mismatch names it and not the choice.
///
/// @param make_nccl  makes the group on NCCL.
std::unique_ptr<GpuGroup> make_choosing_group(std::shared_ptr<Device> device,
                                              std::function<std::unique_ptr<GpuGroup>()> make_nccl);

}  // namespace pycomm::nccl
