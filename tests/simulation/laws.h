#pragma once

#include <string>
#include <vector>

#include "run.h"

namespace simulation {

/// What must hold after a run, whatever happened in it; appends what does not to `found`.
void check_laws(const Run& run, std::vector<std::string>& found);

}  // namespace simulation
