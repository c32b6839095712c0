#include "core/recorder.h"

#include <bit>
#include <cstddef>

namespace pycomm {
namespace {

using Word = std::atomic_ref<std::uint64_t>;

std::uint64_t load(const std::uint64_t& word, std::memory_order order) {
  return Word(const_cast<std::uint64_t&>(word)).load(order);
}

void store(std::uint64_t* word, std::uint64_t value) {
  if (word != nullptr) Word(*word).store(value, std::memory_order_relaxed);
}

static_assert(offsetof(Record, number) == 0, "the word that publishes comes first");

}  // namespace

std::uint64_t Recorder::begin(Record record) {
  record.number = latest_.fetch_add(1, std::memory_order_acq_rel) + 1;
  Words& slot = slots_[record.number % kRecords];
  const auto words = std::bit_cast<Words>(record);
  Word(slot[0]).store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  for (std::size_t i = 1; i < kWords; ++i) Word(slot[i]).store(words[i], std::memory_order_relaxed);
  Word(slot[0]).store(record.number, std::memory_order_release);
  return record.number;
}

std::uint64_t* Recorder::word(std::uint64_t number, std::size_t offset) {
  Words& slot = slots_[number % kRecords];
  if (load(slot[0], std::memory_order_relaxed) != number) return nullptr;
  return &slot[offset / sizeof(std::uint64_t)];
}

void Recorder::start(std::uint64_t number, std::int64_t now_ns, std::uint64_t sequence,
                     std::uint64_t hash) {
  constexpr std::size_t kSequence = offsetof(Record, signature) + offsetof(Signature, sequence);
  store(word(number, kSequence), sequence);
  store(word(number, offsetof(Record, hash)), hash);
  store(word(number, offsetof(Record, started_ns)), static_cast<std::uint64_t>(now_ns));
  store(word(number, offsetof(Record, state)), static_cast<std::uint64_t>(Record::State::kRunning));
}

void Recorder::end(std::uint64_t number, std::int64_t now_ns, bool failed, std::uint64_t sequence,
                   std::uint64_t hash) {
  constexpr std::size_t kSequence = offsetof(Record, signature) + offsetof(Signature, sequence);
  store(word(number, kSequence), sequence);
  store(word(number, offsetof(Record, hash)), hash);
  store(word(number, offsetof(Record, ended_ns)), static_cast<std::uint64_t>(now_ns));
  const auto state = failed ? Record::State::kFailed : Record::State::kDone;
  store(word(number, offsetof(Record, state)), static_cast<std::uint64_t>(state));
}

std::optional<Record> Recorder::read(std::uint64_t number) const {
  const Words& slot = slots_[number % kRecords];
  if (number == 0 || load(slot[0], std::memory_order_acquire) != number) return std::nullopt;
  Words words;
  for (std::size_t i = 0; i < kWords; ++i) words[i] = load(slot[i], std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_acquire);
  if (load(slot[0], std::memory_order_relaxed) != number) return std::nullopt;
  return std::bit_cast<Record>(words);
}

std::optional<Record> Recorder::first_unfinished() const {
  const std::uint64_t last = latest();
  for (std::uint64_t number = last < kRecords ? 1 : last - kRecords + 1; number <= last; ++number) {
    const auto record = read(number);
    if (record && !record->has_ended()) return record;
  }
  return std::nullopt;
}

}  // namespace pycomm
