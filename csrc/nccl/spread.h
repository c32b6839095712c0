#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/placement.h"
#include "core/task.h"
#include "nccl/exchange.h"

namespace pycomm::nccl {

/// Bring every rank's block to all ranks: an all-gather. Between hosts each owner sends its block
/// to one rank of each other host (Placement::folder), inside a host those send what they have to
/// everyone. So a block enters a host once, however many ranks it has there.
///
/// Cost for p blocks of b bytes on H hosts: two exchanges; a host sends p/H (H-1) b to others, the
/// least there is.
///
/// @param blocks  where they lie in this rank's memory, by owner; of any lengths, equal on all
///                ranks. This rank's own is there already.
Task<> spread(Carrier& carrier, const Placement& placement, int rank,
              std::vector<std::span<std::byte>> blocks);

}  // namespace pycomm::nccl
