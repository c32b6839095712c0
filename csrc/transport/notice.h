#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace pycomm {

/// Why everybody must stop.
enum class NoticeKind : std::uint8_t { kMismatch, kTimeout, kPeerLost };

/// A bulletin in shared memory that the first to notice a failure writes and all others read.
class Notice {
 public:
  /// Post the reason. False if somebody else was first; their text stands.
  ///
  /// Who finds this rank's memory changed after the call, and fences, does not find silent().
  bool post(NoticeKind kind, int rank, const std::string& text);

  bool posted() const { return state_.load(std::memory_order_acquire) == kReadable; }

  /// Whether nobody has even begun to post.
  bool silent() const { return state_.load(std::memory_order_acquire) == 0; }

  /// Who posted; valid once posted().
  int rank() const { return rank_; }

  /// Throw what was posted as the error it was. Precondition: posted().
  [[noreturn]] void raise() const;

 private:
  static constexpr std::uint32_t kWriting = 1;
  static constexpr std::uint32_t kReadable = 2;
  static constexpr std::size_t kMaxText = 8191;

  std::atomic<std::uint32_t> state_{0};
  NoticeKind kind_{};
  int rank_ = -1;
  char text_[kMaxText + 1] = {};
};

}  // namespace pycomm
