#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// All-reduce in the canonical order: the ranks of a host are folded in rank order, then the hosts'
/// sums in host order; a divisor divides once, in the accumulator, and 16-bit floats are rounded
/// once. The bits depend on inputs and placement alone: not on the message size, on how the buffer
/// is cut or on where it lies. (Algorithm::kRing between hosts folds in a rotated order instead.)
///
/// Opens the operation, then hands it to all_reduce_window or all_reduce_hierarchical.
Task<> all_reduce(Context& context, const Operation& operation);

}  // namespace pycomm
