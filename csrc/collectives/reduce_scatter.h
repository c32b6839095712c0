#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Rank r ends with block r, `count` elements, of the sum (or other op) of all ranks' inputs of
/// p * `count` elements: the bits of the same part of an all_reduce.
///
/// Inside one host a small input travels with the announcement and each rank folds its block of all
/// of them; larger ones, and those between hosts, are folded by BlockFold.
///
/// Cost for blocks of n bytes, p ranks on H hosts: (p-1) n copied in (nothing where all inputs of
/// the host lie in arenas) and p n folded by each rank. Between hosts each rank receives H-1 host
/// sums of n bytes (2n of 16-bit floats, if some host has several ranks): (H-1) (alpha + n beta).
Task<> reduce_scatter(Context& context, const Operation& operation);

}  // namespace pycomm
