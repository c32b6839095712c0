#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pycomm {

/// What a rank tells the other members when a group is made. Plain bytes.
struct GroupRecord {
  /// Where in the rank's arena its page for the group lies.
  std::uint64_t page_offset;
  /// The lowest channel tag no group of this rank uses yet.
  std::int64_t free_tag;

  /// @throws CommError  these bytes are none.
  static GroupRecord decode(std::string_view bytes);

  /// Believe what a rank has said no further than this goes.
  /// @param rank         whose record it is, in the group.
  /// @param arena_bytes  how large its arena is, if it is mapped here; 0: it is not.
  /// @param page_bytes   what it must have at `page_offset`.
  /// @throws CommError   no rank can have said that.
  void check(int rank, std::size_t arena_bytes, std::size_t page_bytes) const;
};

/// A group's collectives use its first channel tag, its point-to-point messages the second.
constexpr std::int64_t kTagsOfAGroup = 2;

}  // namespace pycomm
