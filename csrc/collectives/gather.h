#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

Task<> gather(Context& context, const Operation& operation);

}  // namespace pycomm
