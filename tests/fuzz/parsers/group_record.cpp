// What a rank says when a group is made: its page, staging and mail lie there afterwards.

#include "group/group_record.h"

#include <climits>

#include "core/error.h"
#include "parser.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  constexpr std::size_t kArenaBytes = 1 << 20;
  constexpr std::size_t kPageBytes = 3 << 12;
  try {
    const auto record = pycomm::GroupRecord::decode({reinterpret_cast<const char*>(data), bytes});
    record.check(2, kArenaBytes, kPageBytes);
    require(record.page_offset <= kArenaBytes && record.page_offset + kPageBytes <= kArenaBytes,
            "the page lies in the arena");
    require(record.free_tag >= 0 && record.free_tag + pycomm::kTagsOfAGroup <= INT_MAX,
            "the tags are ints");
  } catch (const pycomm::CommError&) {
  }
  return 0;
}

std::vector<std::string> seeds() {
  return {bytes_of(pycomm::GroupRecord{4096, 2}), bytes_of(pycomm::GroupRecord{0, 1 << 30}),
          bytes_of(pycomm::GroupRecord{(1 << 20) - (3 << 12), 0})};
}
