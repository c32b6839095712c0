#pragma once

#include <functional>

#include "plan.h"

namespace simulation {

/// The smallest part of a plan found that still fails: without the faults, the steps and the
/// interruptions that it does not need. Every trial is a run.
/// @param fails  whether the plan with these cuts does.
Cuts minimise(const Plan& plan, Cuts cuts, const std::function<bool(const Cuts&)>& fails);

}  // namespace simulation
