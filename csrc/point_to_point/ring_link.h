#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "point_to_point/link.h"
#include "transport/arena.h"
#include "transport/doorbell.h"

namespace pycomm {

/// Frames from one rank to another of its host, in the sender's memory: a ring of entries, small
/// payloads in them, and behind it a ring of slots for the pieces of large messages.
///
/// The sender writes entry and slot, then `pushed`; the receiver reads them, then writes `popped`.
struct FrameRing {
  static constexpr std::uint64_t kEntries = 16;
  static constexpr std::uint64_t kSlots = 4;
  struct Entry {
    Frame frame;
    std::array<std::byte, Frame::kEagerBytes> payload;
  };

  alignas(64) std::atomic<std::uint64_t> pushed;
  alignas(64) std::atomic<std::uint64_t> popped;
  std::atomic<std::uint64_t> slots_popped;
  alignas(64) std::array<Entry, kEntries> entries;
};

/// How a rank divides its share of a group's memory among the ranks of its host it sends to. The
/// slots take 512 KiB in all (128 KiB each between two ranks), or 4 KiB a slot where ranks are
/// many; a ring takes 18 KiB. Pages cost memory once touched, so a pair that never talks costs
/// nothing.
struct RingLayout {
  explicit RingLayout(int local_size);
  std::size_t slot_bytes;
  std::size_t ring_bytes;
  /// Of each rank; a multiple of the arena's alignment.
  std::size_t bytes;
  std::size_t offset_of_ring_to(int local_peer) const {
    return static_cast<std::size_t>(local_peer) * ring_bytes;
  }
};

/// The link between two ranks of one host.
class RingLink : public Link {
 public:
  /// @param mine        what this rank sends goes here, in its own memory.
  /// @param theirs      what the peer sends comes from here, in the peer's memory.
  /// @param arena       this rank's; @param peer_arena  the peer's, as it is mapped here.
  RingLink(FrameRing* mine, FrameRing* theirs, std::size_t slot_bytes, const Arena& arena,
           const Arena& peer_arena, Doorbell& peer_doorbell)
      : mine_(mine),
        theirs_(theirs),
        slot_bytes_(slot_bytes),
        arena_(arena),
        peer_arena_(peer_arena),
        peer_doorbell_(peer_doorbell) {}

  bool push(const Frame& frame, std::span<const std::byte> payload) override;
  const Frame* front() override;
  const std::byte* payload() override;
  std::size_t payload_room() override {
    return in_slot(oldest().frame) ? slot_bytes_ : Frame::kEagerBytes;
  }
  void pop() override;
  std::size_t piece_bytes() const override { return slot_bytes_; }
  std::uint64_t address_for_peer(const std::byte* memory, std::size_t bytes) const override {
    return arena_.contains(memory, bytes) ? arena_.offset_of(memory) : Frame::kNowhere;
  }
  std::byte* memory_of_peer(std::uint64_t address, std::size_t bytes) const override {
    return peer_arena_.holds(address, bytes) ? peer_arena_.base() + address : nullptr;
  }
  bool shares_memory() const override { return true; }

 private:
  static std::byte* slot(FrameRing* ring, std::uint64_t number, std::size_t slot_bytes) {
    return reinterpret_cast<std::byte*>(ring + 1) + number % FrameRing::kSlots * slot_bytes;
  }
  static bool in_slot(const Frame& frame) { return frame.kind == Frame::Kind::kData; }
  FrameRing::Entry& oldest() { return theirs_->entries[popped_ % FrameRing::kEntries]; }

  FrameRing* const mine_;
  FrameRing* const theirs_;
  const std::size_t slot_bytes_;
  const Arena& arena_;
  const Arena& peer_arena_;
  Doorbell& peer_doorbell_;
  std::uint64_t pushed_ = 0;
  /// What the receiver had popped when last looked at: its cache line is fetched only when the ring
  /// seems full.
  std::uint64_t known_popped_ = 0;
  std::uint64_t slots_pushed_ = 0;
  std::uint64_t popped_ = 0;
  std::uint64_t slots_popped_ = 0;
};

}  // namespace pycomm
