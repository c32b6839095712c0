#pragma once

#include <cstddef>
#include <span>

#include "collectives/placement.h"
#include "core/operation.h"
#include "core/task.h"
#include "nccl/exchange.h"

namespace pycomm::nccl {

/// Whether run_carried() can run it. All ranks find the same.
bool can_be_carried(const Operation& operation, const Placement& placement,
                    std::size_t scratch_bytes);

/// A collective on GPUs by a carrier that only moves bytes. Reductions have the bits of the host's
/// plane (reduce_in_exact_order). What everyone receives enters each host once (spread): a
/// broadcast's root first gives its host's ranks a part each. gather, scatter and all_to_all go
/// straight (exchange_of).
///
/// Cost beside those: a broadcast of n bytes is three exchanges. Where R ranks share the root's
/// host, the root sends 2 n (R-1)/R inside it, and each of the R sends n/R to every other host.
///
/// @param operation  on memory of the GPU; a broadcast's input is its output, and an all-gather's
///                   lies in its place there.
/// @param scratch    for reductions, of the GPU; as long on all ranks.
/// @throws CommError, PeerLostError  the carrier, or a kernel's launch, has failed.
Task<> run_carried(Carrier& carrier, const Operation& operation, const Placement& placement,
                   int rank, std::span<std::byte> scratch);

}  // namespace pycomm::nccl
