#include "collectives/context.h"

#include "core/signature.h"

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

std::string describe_call(const Context& context, const Operation& operation) {
  const Signature signature = Signature::of(operation, context.sequence, context.history);
  return signature.describe() + " (call #" + std::to_string(context.sequence) + signature.place() +
         ") on rank " + std::to_string(context.rank);
}

}  // namespace pycomm
