#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Fold what all ranks announced with the operation (at most Announcement::kEagerBytes).
/// Every rank folds everything in rank order: p reads of n bytes, no further step.
void all_reduce_announced(Context& context, const Operation& operation);

/// All-reduce inside one host. Rank r folds part r of every rank's buffer, in rank order.
///
/// If every rank's buffer lies in its arena, the buffers themselves are read and written:
///
///   announced | fold part r of all buffers, write it to all buffers | meet
///
/// Otherwise pieces of `staging.piece_bytes` go through three staging slots a rank, one meeting for
/// each piece (i counts pieces; slot i % 3):
///
///   copy in 0 | meet | copy in 1, fold part r of 0 | meet | copy out 0, copy in 2, fold of 1 | ...
///
/// Three slots, because while a slow rank still copies out i, a fast one already copies in i+2.
///
/// Cost for n bytes and p ranks: (p n) / p read and n written by each rank in arena memory, and two
/// copies more through staging; one meeting for each piece.
Task<> all_reduce_window(Context& context, const Operation& operation);

}  // namespace pycomm
