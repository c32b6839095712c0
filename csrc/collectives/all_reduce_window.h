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
/// Otherwise pieces go through two staging slots a rank, one meeting for each piece (i counts
/// pieces; slot i % 2). A rank copies in only what others fold; its own part is folded from where
/// the user has it, to the user's output and into the slots of the others, which copy out of their
/// own slot what others have folded:
///
///   copy in 0 | meet | copy in 1, fold part r of 0 | meet | copy out 0, copy in 2, fold of 1 | ...
///
/// Two slots: others write to slot i % 2 again only after the meeting behind copy in i+2, which
/// follows copy out i.
///
/// Cost for n bytes and p ranks: n read and n written by each rank in arena memory; through staging
/// (p-1)/p n copied in, n read and n written by the fold, (p-1)/p n copied out, and one meeting for
/// each piece.
Task<> all_reduce_window(Context& context, const Operation& operation);

/// Reduce inside one host: the staged way of all_reduce_window, but the root alone copies out, and
/// inputs that all lie in arenas (announced) are read there, so that nothing is copied in.
Task<> reduce_window(Context& context, const Operation& operation);

}  // namespace pycomm
