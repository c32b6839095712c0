#include "transport/notice.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace pycomm {

bool Notice::post(NoticeKind kind, int rank, const std::string& text) {
  std::uint32_t expected = 0;
  const bool first = state_.compare_exchange_strong(expected, kWriting, std::memory_order_acq_rel);
  if (first) {
    kind_ = kind;
    rank_ = rank;
    const std::size_t length = std::min(text.size(), kMaxText);
    std::memcpy(text_, text.data(), length);
    text_[length] = '\0';
    state_.store(kReadable, std::memory_order_release);
  }
  std::atomic_thread_fence(std::memory_order_release);  // before what the caller writes next
  return first;
}

void Notice::raise() const {
  const std::string text(text_, strnlen(text_, kMaxText));  // a peer may have left out its end
  switch (kind_) {
    case NoticeKind::kMismatch:
      throw MismatchError(text);
    case NoticeKind::kTimeout:
      throw CommTimeoutError(text);
    case NoticeKind::kPeerLost:
      break;
  }
  throw PeerLostError(text);
}

}  // namespace pycomm
