#pragma once

#include "collectives/context.h"
#include "core/operation.h"

namespace pycomm {

/// Whether nothing is left to do for `operation` but this rank's own fold once every rank has
/// announced it: a barrier, or an all-reduce whose payload travels with the announcement, inside
/// one host.
bool is_immediate(const Context& context, const Operation& operation);

/// Run such an operation as the group's next one, if every rank announces it within microseconds:
/// without a coroutine or an allocation, which together cost as much as the cache line that
/// travels.
///
/// @param may_spin  every rank has a core; if not, the others get this one between two looks.
///
/// False: the peers are late. The operation has been announced and must go on, as an Execution.
///
/// Cost for n bytes and p ranks: p n read and n written; p - 1 cache lines, and n bytes besides if
/// they do not fit into those.
/// @throws MismatchError, and what has finished the group before.
bool run_immediately(Context& context, const Operation& operation, bool may_spin);

}  // namespace pycomm
