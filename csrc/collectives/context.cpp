#include "collectives/context.h"

namespace pycomm {

Lane Context::lane(int index) const {
  Lane lane{*channel, tag, host(), {}};
  for (const auto& ranks : placement.hosts) {
    lane.peers.push_back(world_rank(ranks[static_cast<std::size_t>(index)]));
  }
  return lane;
}

std::uint64_t Context::arena_offset(const void* buffer, std::size_t bytes) const {
  return arena.contains(buffer, bytes) ? arena.offset_of(buffer) : Announcement::kNotInArena;
}

}  // namespace pycomm
