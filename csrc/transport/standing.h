#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "core/signature.h"

namespace pycomm {

/// Where a rank stands that does not get on: the calls in which its threads wait, and how far each
/// group has been called here. Plain bytes, since hosts send it to each other. One rank's Standing
/// was true as a whole at one moment.
struct Standing {
  /// Threads and groups beyond these are left out: a fault among them ends at the deadline.
  static constexpr int kMostCalls = 4;
  static constexpr int kMostGroups = 32;
  static constexpr std::size_t kMostMembers = 40;

  /// A thread waits for an operation that is under way and has not ended for a while.
  struct Call {
    std::uint64_t group = 0;  // as in Use
    std::uint64_t hash = 0;   // of the signature
    std::uint32_t thread = 0;
    std::int32_t tag = 0;  // of the group
    std::int32_t group_rank = 0;
    std::uint32_t unused = 0;
    std::uint64_t number = 0;                  // which of the operations that Use counts
    std::array<char, kMostMembers> members{};  // "0, 1, 2", cut off; ends at the first zero
    Signature signature;
  };
  /// A group of this rank.
  struct Use {
    std::uint64_t group = 0;   // the same number on its members, and in no other group of the job
    std::uint64_t issued = 0;  // operations that were called here, ended or not
    std::uint32_t thread = 0;  // which called the last one; before the first, made the group
    std::uint32_t unused = 0;
  };

  std::int32_t rank = -1;  // in the world
  std::int32_t call_count = 0;
  std::int32_t group_count = 0;
  std::int32_t unused = 0;
  std::array<Call, kMostCalls> calls{};
  std::array<Use, kMostGroups> groups{};
};

/// Where a rank shows its Standing to those of its host. One writes at a time, any number read.
///
/// A sequence lock: the version is odd while somebody writes, and for ever if the writer dies then.
class StandingBoard {
 public:
  void show(const Standing& standing);

  /// Changes with every show(); 0: nothing was shown yet.
  std::uint64_t version() const { return version_.load(std::memory_order_acquire); }

  /// What is shown; nothing if nothing was, or if it changes right now.
  std::optional<Standing> read() const;

 private:
  static constexpr std::size_t kWords = sizeof(Standing) / sizeof(std::uint64_t);

  std::atomic<std::uint64_t> version_{0};
  std::array<std::atomic<std::uint64_t>, kWords> words_{};
};

/// Where a rank of the host tells another that its call can never end: a place for one letter, from
/// whoever finds it empty. Who finds a fault raises it at once, and is then no longer seen in it.
class Verdict {
 public:
  static constexpr std::size_t kMostText = 2560;

  /// @param tag  of the receiver's group. False: there is another letter.
  bool post(int tag, const std::string& text);

  struct Letter {
    int tag;
    std::string text;
  };
  /// For the receiver.
  std::optional<Letter> take();

 private:
  static constexpr std::uint32_t kEmpty = 0;
  static constexpr std::uint32_t kWriting = 1;  // for ever if the writer dies then
  static constexpr std::uint32_t kReadable = 2;

  std::atomic<std::uint32_t> state_{kEmpty};
  std::int32_t tag_ = 0;
  std::array<char, kMostText> text_{};
};

static_assert(sizeof(Standing) % sizeof(std::uint64_t) == 0);

}  // namespace pycomm
