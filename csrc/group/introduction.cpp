#include "group/introduction.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <string_view>

#include "collectives/extremes.h"
#include "core/error.h"
#include "group/group_record.h"
#include "point_to_point/ring_link.h"
#include "transport/arena.h"
#include "transport/handover.h"
#include "transport/window.h"

namespace pycomm {
namespace {

/// Begins every introduction: how long everything is that ranks read of each other's memory and
/// messages. Versions that differ there must not meet.
std::string layout() {
  std::string text = "pycomm";
  for (const std::size_t bytes :
       {sizeof(ProcessPage), sizeof(GroupPage), sizeof(Announcement), sizeof(FrameRing),
        sizeof(Frame), sizeof(Extremes), sizeof(GroupRecord)}) {
    text += ' ';
    text += std::to_string(bytes);
  }
  return text;
}

[[noreturn]] void refuse(int rank, const std::string& problem) {
  throw CommError("init: rank " + std::to_string(rank) + " sent a malformed introduction: " +
                  problem + ".\n  All ranks must run the same version of pycomm.");
}

bool is_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char digit) {
    return (digit >= '0' && digit <= '9') || (digit >= 'a' && digit <= 'f');
  });
}

}  // namespace

std::string Introduction::encode() const {
  return layout() + '\n' + address + '\n' + std::to_string(arena_bytes) + '\n' + token + '\n' +
         host_key;
}

Introduction Introduction::decode(const std::string& text, int rank) {
  std::array<std::string_view, 4> fields;
  std::string_view rest = text;
  for (std::string_view& field : fields) {
    const std::size_t end = rest.find('\n');
    if (end == std::string_view::npos) refuse(rank, "it has too few lines");
    field = rest.substr(0, end);
    rest.remove_prefix(end + 1);
  }
  const auto& [its_layout, address, digits, token] = fields;
  if (its_layout != layout()) refuse(rank, "it has another version of pycomm than this rank");
  if (!Handover::is_address(address)) refuse(rank, "its address is none of pycomm's");
  std::size_t bytes = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), bytes);
  if (error != std::errc() || end != digits.data() + digits.size() || bytes == 0 ||
      bytes % Arena::kAlignment != 0) {
    refuse(rank, "its shared memory has no such size");
  }
  if (token.size() != Handover::kTokenLength || !is_hex(token)) refuse(rank, "its token is none");
  return {std::string(address), bytes, std::string(token), std::string(rest)};
}

}  // namespace pycomm
