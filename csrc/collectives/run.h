#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Run whichever collective `operation` asks for, as number `context.sequence` of the group.
Task<> run_collective(Context& context, const Operation& operation);

}  // namespace pycomm
