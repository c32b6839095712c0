#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "point_to_point/frame.h"

namespace pycomm {

/// Frames to and from one peer, each way in order. Used by one thread at a time.
class Link {
 public:
  virtual ~Link() = default;

  /// Pass a frame on. False: no room now, try again later.
  virtual bool push(const Frame& frame, std::span<const std::byte> payload) = 0;

  /// The oldest frame that came and was not popped, or null. Its payload is valid until then.
  virtual const Frame* front() = 0;
  virtual const std::byte* payload() = 0;
  /// How many bytes came with it, whatever the frame says.
  virtual std::size_t payload_room() = 0;
  virtual void pop() = 0;

  /// How long the payload of a kData frame may be.
  virtual std::size_t piece_bytes() const = 0;
  /// What to call `bytes` at `memory` so that the peer can read or write it there, or
  /// Frame::kNowhere.
  virtual std::uint64_t address_for_peer(const std::byte* memory, std::size_t bytes) const = 0;
  /// The `bytes` of the peer's memory behind an address that it gave; null: it has no such memory.
  virtual std::byte* memory_of_peer(std::uint64_t address, std::size_t bytes) const = 0;
  /// Whether there can be such addresses.
  virtual bool shares_memory() const = 0;
};

/// A rank's link to itself: all of its memory is at hand.
class SelfLink : public Link {
 public:
  bool push(const Frame& frame, std::span<const std::byte> payload) override {
    frames_.push_back({frame, {payload.begin(), payload.end()}});
    return true;
  }
  const Frame* front() override { return frames_.empty() ? nullptr : &frames_.front().frame; }
  const std::byte* payload() override { return frames_.front().payload.data(); }
  std::size_t payload_room() override { return frames_.front().payload.size(); }
  void pop() override { frames_.pop_front(); }
  std::size_t piece_bytes() const override { return std::size_t{1} << 20; }
  std::uint64_t address_for_peer(const std::byte* memory, std::size_t) const override {
    return reinterpret_cast<std::uint64_t>(memory);
  }
  std::byte* memory_of_peer(std::uint64_t address, std::size_t) const override {
    return reinterpret_cast<std::byte*>(address);
  }
  bool shares_memory() const override { return true; }

 private:
  struct Kept {
    Frame frame;
    std::vector<std::byte> payload;
  };
  std::deque<Kept> frames_;
};

}  // namespace pycomm
