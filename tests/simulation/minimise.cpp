#include "minimise.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace simulation {

Cuts minimise(const Plan& plan, Cuts cuts, const std::function<bool(const Cuts&)>& fails) {
  for (bool smaller = true; std::exchange(smaller, false);) {
    const auto try_without = [&](std::vector<int> Cuts::* list, int number) {
      auto& left_out = cuts.*list;
      if (std::find(left_out.begin(), left_out.end(), number) != left_out.end()) return;
      Cuts more = cuts;
      (more.*list).push_back(number);
      if (!fails(more)) return;
      cuts = std::move(more);
      smaller = true;
    };
    for (int i = 0; i < static_cast<int>(plan.faults.size()); ++i) try_without(&Cuts::faults, i);
    for (int i = 0; i < static_cast<int>(plan.steps.size()); ++i) try_without(&Cuts::steps, i);
    if (!cuts.calm) {
      Cuts calmer = cuts;
      calmer.calm = true;
      if (fails(calmer)) {
        cuts = calmer;
        smaller = true;
      }
    }
  }
  return cuts;
}

}  // namespace simulation
