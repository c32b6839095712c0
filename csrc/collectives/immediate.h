#pragma once

#include "collectives/context.h"
#include "core/operation.h"

namespace pycomm {

/// Whether `operation` may end within microseconds of the moment when every rank has announced it:
/// inside one host a barrier, or an all-reduce that is not large.
bool is_immediate(const Context& context, const Operation& operation);

/// Run such an operation as the group's next one, if no step of it waits for more than
/// microseconds: without a coroutine or an allocation, which together cost as much as the cache
/// line that travels. Staged ones it only announces.
///
/// @param may_spin  every rank has a core; if not, the others get this one between two looks.
///
/// False: the peers are late, or it is staged. It must go on, as an Execution, from where it is.
///
/// Cost: see HostWay; one cache line from each peer, and one more where ranks meet.
/// @throws MismatchError, and what has finished the group before.
bool run_immediately(Context& context, const Operation& operation, bool may_spin);

}  // namespace pycomm
