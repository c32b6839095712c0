#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/signature.h"

namespace pycomm {

/// What a process notes of one of its operations. Plain words, no pointers: other processes read
/// it, and files keep it.
struct Record {
  enum class State : std::uint64_t { kQueued, kRunning, kDone, kFailed };
  enum class What : std::uint8_t { kCollective, kSend, kReceive };
  static constexpr std::size_t kMaxGroupName = 43;

  /// Among all operations of the process, from 1.
  std::uint64_t number = 0;
  State state = State::kQueued;
  // Of the host's steady clock, nanoseconds; 0: not yet.
  std::int64_t queued_ns = 0;
  std::int64_t started_ns = 0;
  std::int64_t ended_ns = 0;
  /// Equal for the members of a group, and for nobody else.
  std::uint64_t group = 0;
  /// Of a collective once its group has been told of it: equal on two ranks exactly if this call
  /// and all before it agree. 0: not yet, or a message.
  std::uint64_t hash = 0;
  std::uint64_t bytes = 0;
  // Of a message: rank in the group and in the world, -1 for any.
  std::int32_t peer = 0;
  std::int32_t peer_in_world = -1;
  std::int32_t tag = 0;
  What what = What::kCollective;
  std::array<char, kMaxGroupName> group_name{};  // cut off, ends at the first zero
  /// A message has only its elements, its name and its site here.
  Signature signature;

  /// "all_reduce of 4096 float32, shape (64, 64), SUM", "send of 16 int64 to rank 3, tag 7".
  std::string describe() const;
  std::string describe_group() const;
  bool has_ended() const { return state == State::kDone || state == State::kFailed; }
};

static_assert(sizeof(Record) == 9 * 8 + 4 + Record::kMaxGroupName + 1 + sizeof(Signature),
              "no padding");

}  // namespace pycomm
