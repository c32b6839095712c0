#pragma once

#include "collectives/context.h"
#include "core/operation.h"

namespace pycomm {

/// Whether `operation` may end within microseconds of the moment when every rank has announced it:
/// inside one host a barrier, or an all-reduce that is not large.
bool is_immediate(const Context& context, const Operation& operation);

/// Run such an operation as the group's next one, if no step of it waits longer than `looks` looks:
/// without a coroutine, an allocation or a clock, which together cost as much as the cache line
/// that travels. Staged ones it only announces.
///
/// False: the peers are late, or it is staged. It must go on, as an Execution, from where it is.
///
/// Cost: see HostWay; one cache line from each peer, and one more where ranks meet.
/// @throws MismatchError, and what has finished the group before.
bool run_immediately(Context& context, const Operation& operation, int looks);

}  // namespace pycomm
