#include "point_to_point/ring_link.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace pycomm {
namespace {

constexpr std::size_t kSlotBudget = 512 << 10;
constexpr std::size_t kLeastSlotBytes = 4 << 10;
constexpr std::size_t kMostSlotBytes = 128 << 10;

}  // namespace

RingLayout::RingLayout(int local_size) {
  const auto peers = static_cast<std::size_t>(std::max(1, local_size - 1));
  slot_bytes = std::clamp(std::bit_floor(kSlotBudget / FrameRing::kSlots / peers), kLeastSlotBytes,
                          kMostSlotBytes);
  ring_bytes = sizeof(FrameRing) + FrameRing::kSlots * slot_bytes;
  ring_bytes = (ring_bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  bytes = static_cast<std::size_t>(local_size) * ring_bytes;
}

bool RingLink::push(const Frame& frame, std::span<const std::byte> payload) {
  if (pushed_ - known_popped_ == FrameRing::kEntries) {
    known_popped_ = mine_->popped.load(std::memory_order_acquire);
    if (pushed_ - known_popped_ == FrameRing::kEntries) return false;
  }
  FrameRing::Entry& entry = mine_->entries[pushed_ % FrameRing::kEntries];
  std::byte* target = entry.payload.data();
  if (in_slot(frame)) {
    const std::uint64_t free_again = mine_->slots_popped.load(std::memory_order_acquire);
    if (slots_pushed_ - free_again == FrameRing::kSlots) return false;
    target = slot(mine_, slots_pushed_++, slot_bytes_);
  }
  entry.frame = frame;
  if (!payload.empty()) std::memcpy(target, payload.data(), payload.size());
  mine_->pushed.store(++pushed_, std::memory_order_release);
  peer_doorbell_.ring();
  return true;
}

const Frame* RingLink::front() {
  if (theirs_->pushed.load(std::memory_order_acquire) == popped_) return nullptr;
  return &oldest().frame;
}

const std::byte* RingLink::payload() {
  const FrameRing::Entry& entry = oldest();
  return in_slot(entry.frame) ? slot(theirs_, slots_popped_, slot_bytes_) : entry.payload.data();
}

void RingLink::pop() {
  if (in_slot(oldest().frame)) {
    theirs_->slots_popped.store(++slots_popped_, std::memory_order_release);
  }
  theirs_->popped.store(++popped_, std::memory_order_release);
  peer_doorbell_.ring();  // it may wait for the room
}

}  // namespace pycomm
