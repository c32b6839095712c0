#include "core/error.h"
#include "group/group.h"

namespace pycomm {

std::shared_ptr<Group> Group::new_group(const std::vector<int>&, const InterruptCheck&) {
  throw CommError("new_group: not written yet");  // replaced in this very change
}

std::shared_ptr<Group> Group::split(std::optional<std::int64_t>, std::int64_t,
                                    const InterruptCheck&) {
  throw CommError("split: not written yet");  // replaced in this very change
}

}  // namespace pycomm
