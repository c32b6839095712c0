#include "group/control_message.h"

#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "core/error.h"

namespace pycomm::control {
namespace {

/// Changes with the bodies, so that two versions of pycomm never misread each other.
constexpr std::uint32_t kMagic = 0x70794301;

struct Header {
  std::uint32_t magic;
  std::uint32_t body;  // its place in Body
};

template <typename T>
constexpr bool kIsPlain =
    std::is_trivially_copyable_v<T> && sizeof(Header) + sizeof(T) <= kMostBytes;
static_assert(kIsPlain<Beat> && kIsPlain<Loss> && kIsPlain<End> && kIsPlain<Standing> &&
              kIsPlain<Leave>);

bool is_rank(std::int32_t rank, int world_size) { return rank >= 0 && rank < world_size; }
bool fits(std::int32_t count, std::size_t most) {
  return count >= 0 && static_cast<std::size_t>(count) <= most;
}

template <std::size_t N>
bool are_ranks(std::int32_t count, const std::array<std::int32_t, N>& ranks, int world_size) {
  if (!fits(count, N)) return false;
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    if (!is_rank(ranks[i], world_size)) return false;
  }
  return true;
}

bool make_sense(const Beat& beat, int world_size) {
  return are_ranks(beat.stalled_count, beat.stalled, world_size);
}
bool make_sense(const Loss& loss, int world_size) {
  return are_ranks(loss.rank_count, loss.ranks, world_size) && loss.text.back() == '\0';
}
bool make_sense(const End& end, int) {
  return end.tag >= End::kJob && end.kind <= NoticeKind::kPeerLost && end.is_for_all <= 1 &&
         end.text.back() == '\0';
}
bool make_sense(const Standing& standing, int world_size) {
  return is_rank(standing.rank, world_size) && fits(standing.call_count, Standing::kMostCalls) &&
         fits(standing.group_count, Standing::kMostGroups);
}
bool make_sense(const Leave& leave, int world_size) {
  return leave.successor == Leave::kNobody || is_rank(leave.successor, world_size);
}

template <std::size_t Index = 0>
std::optional<Body> read_body(std::uint32_t wanted, std::span<const std::byte> bytes,
                              int world_size) {
  if constexpr (Index == std::variant_size_v<Body>) {
    return std::nullopt;
  } else {
    if (wanted != Index) return read_body<Index + 1>(wanted, bytes, world_size);
    std::variant_alternative_t<Index, Body> body;
    if (bytes.size() != sizeof(body)) return std::nullopt;
    std::memcpy(static_cast<void*>(&body), bytes.data(), sizeof(body));
    if (!make_sense(body, world_size)) return std::nullopt;
    return body;
  }
}

}  // namespace

std::vector<std::byte> encode(const Body& body) {
  return std::visit(
      [&](const auto& plain) {
        const Header header{kMagic, static_cast<std::uint32_t>(body.index())};
        std::vector<std::byte> bytes(sizeof(header) + sizeof(plain));
        std::memcpy(bytes.data(), &header, sizeof(header));
        std::memcpy(bytes.data() + sizeof(header), &plain, sizeof(plain));
        return bytes;
      },
      body);
}

Body decode(std::span<const std::byte> bytes, int from, int world_size) {
  std::optional<Body> body;
  if (Header header; bytes.size() >= sizeof(header)) {
    std::memcpy(&header, bytes.data(), sizeof(header));
    if (header.magic == kMagic) {
      body = read_body(header.body, bytes.subspan(sizeof(header)), world_size);
    }
  }
  if (!body) refuse(from, bytes.size());
  return *std::move(body);
}

void refuse(int from, std::size_t bytes) {
  throw MismatchError("rank " + std::to_string(from) + " sent a malformed control message of " +
                      std::to_string(bytes) +
                      " bytes.\n  All ranks must run the same version of pycomm.");
}

}  // namespace pycomm::control
