#include "group/group_record.h"

#include <climits>
#include <cstring>
#include <string>

#include "core/error.h"
#include "transport/arena.h"

namespace pycomm {

GroupRecord GroupRecord::decode(std::string_view bytes) {
  GroupRecord record;
  if (bytes.size() != sizeof(record)) {
    throw CommError("init: a rank sent a malformed group record: " + std::to_string(bytes.size()) +
                    " bytes instead of " + std::to_string(sizeof(record)) +
                    ".\n  All ranks must run the same version of pycomm.");
  }
  std::memcpy(&record, bytes.data(), sizeof(record));
  return record;
}

void GroupRecord::check(int rank, std::size_t arena_bytes, std::size_t page_bytes) const {
  const bool tag_fits = free_tag >= 0 && free_tag <= INT_MAX - kTagsOfAGroup;
  const bool page_fits =
      arena_bytes == 0 || (page_offset % Arena::kAlignment == 0 && page_bytes <= arena_bytes &&
                           page_offset <= arena_bytes - page_bytes);
  if (tag_fits && page_fits) return;
  throw CommError("rank " + std::to_string(rank) + " sent a malformed group record: " +
                  (tag_fits ? "its page at " + std::to_string(page_offset) + " is not in its " +
                                  std::to_string(arena_bytes) + " bytes of shared memory"
                            : "its free tag is " + std::to_string(free_tag)) +
                  ".\n  All ranks must run the same version of pycomm.");
}

}  // namespace pycomm
