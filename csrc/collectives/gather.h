#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// The root ends with all ranks' elements, one after the other in rank order: `count` of each, or
/// `output_counts[r]` of rank r. Elements are only moved: any dtype.
///
/// Inside the root's host small inputs travel with the announcement, inputs in arenas are read by
/// the root where they lie, others go through staging (see exchange). Ranks of other hosts send to
/// the root one after the other:
///
///   round t = 1..p-1   the root receives from the rank t positions before it
///
/// Cost for n bytes a rank, p ranks, q of them on the root's host: (p-q) alpha + (p-q) n beta at
/// the root, one message of n bytes from every other rank; p n copied by the root.
Task<> gather(Context& context, const Operation& operation);

}  // namespace pycomm
