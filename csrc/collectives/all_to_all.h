#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Block r of rank s's input becomes block s of rank r's output; blocks of `count` elements, or as
/// many as `input_counts` and `output_counts` say. Elements are only moved: any dtype.
///
/// Inside one host small inputs travel with the announcement, inputs in arenas are read where they
/// lie, and others go through staging; between hosts blocks travel in pairwise rounds (see
/// exchange).
///
/// Given counts are compared first (see check_counts): what a rank sends must be what its receiver
/// expects, and nothing is written where it is not.
///
/// Cost for blocks of n bytes, p ranks, q of them on a host: each rank sends p-q messages of n
/// bytes, (p-q) (alpha + n beta), and copies p n.
///
/// @throws MismatchError  on every rank: two ranks' counts differ.
Task<> all_to_all(Context& context, const Operation& operation);

}  // namespace pycomm
