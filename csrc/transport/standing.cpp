#include "transport/standing.h"

#include <algorithm>
#include <cstring>

namespace pycomm {

void StandingBoard::show(const Standing& standing) {
  std::array<std::uint64_t, kWords> words;
  std::memcpy(words.data(), &standing, sizeof(standing));
  const std::uint64_t version = version_.load(std::memory_order_relaxed) | 1;
  version_.store(version, std::memory_order_relaxed);
  // Release stores: who sees one of these words then sees the odd version, or a later one.
  for (std::size_t i = 0; i < kWords; ++i) words_[i].store(words[i], std::memory_order_release);
  version_.store(version + 1, std::memory_order_release);
}

std::optional<Standing> StandingBoard::read() const {
  const std::uint64_t before = version();
  if (before == 0 || before % 2 == 1) return std::nullopt;
  std::array<std::uint64_t, kWords> words;
  for (std::size_t i = 0; i < kWords; ++i) words[i] = words_[i].load(std::memory_order_acquire);
  if (version_.load(std::memory_order_relaxed) != before) return std::nullopt;
  Standing standing;
  std::memcpy(static_cast<void*>(&standing), words.data(), sizeof(standing));
  return standing;
}

bool Verdict::post(int tag, const std::string& text) {
  std::uint32_t expected = kEmpty;
  if (!state_.compare_exchange_strong(expected, kWriting, std::memory_order_acq_rel)) return false;
  tag_ = tag;
  const std::size_t length = std::min(text.size(), kMostText - 1);
  text.copy(text_.data(), length);
  text_[length] = '\0';
  state_.store(kReadable, std::memory_order_release);
  return true;
}

std::optional<Verdict::Letter> Verdict::take() {
  if (state_.load(std::memory_order_acquire) != kReadable) return std::nullopt;
  Letter letter{tag_, text_.data()};
  state_.store(kEmpty, std::memory_order_release);
  return letter;
}

}  // namespace pycomm
