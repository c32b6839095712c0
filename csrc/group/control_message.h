#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "transport/notice.h"
#include "transport/standing.h"

/// What switchboards send each other: a header, and one of the bodies below in a fixed size.
namespace pycomm::control {

/// "This host is there." From the rank that speaks for it.
struct Beat {
  static constexpr int kMostStalled = 32;
  std::int32_t stalled_count = 0;
  /// Ranks of the host whose progress thread has not been seen lately; the first of them.
  std::array<std::int32_t, kMostStalled> stalled{};
};

/// These ranks are gone.
struct Loss {
  static constexpr int kMostRanks = 64;
  static constexpr std::size_t kMostText = 640;
  std::int32_t rank_count = 0;
  std::array<std::int32_t, kMostRanks> ranks{};
  std::array<char, kMostText> text{};  // of an error; ends at the first zero
};

/// A group of the receiver's, or the whole job, is over.
struct End {
  static constexpr std::int32_t kJob = -1;
  static constexpr std::size_t kMostText = 2560;
  std::int32_t tag = kJob;  // of the group
  NoticeKind kind{};
  std::uint8_t is_for_all = 0;  // 1: the receiver tells the group's other members
  std::array<std::uint8_t, 2> unused{};
  std::int32_t rank = 0;  // who says so, in the group
  std::array<char, kMostText> text{};
};

/// The sender no longer speaks for its host: it leaves the job.
struct Leave {
  static constexpr std::int32_t kNobody = -1;
  std::int32_t successor = kNobody;  // who does
};

using Body = std::variant<Beat, Loss, End, Standing, Leave>;

/// The longest message, below what any MPI passes on at once.
constexpr std::size_t kMostBytes = 3 << 10;

std::vector<std::byte> encode(const Body& body);

/// Ranks in what is returned are ranks of the world, counts fit their arrays, texts end.
/// @throws MismatchError  `bytes` are no such message.
Body decode(std::span<const std::byte> bytes, int from, int world_size);

/// What decode() does with a message that cannot be one.
[[noreturn]] void refuse(int from, std::size_t bytes);

/// As much of `text` as fits, with a zero behind it.
template <std::size_t N>
void set_text(std::array<char, N>& field, std::string_view text) {
  field.fill('\0');
  text.substr(0, N - 1).copy(field.data(), N - 1);
}

}  // namespace pycomm::control
