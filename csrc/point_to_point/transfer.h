#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>

#include "core/clock.h"
#include "core/device_call.h"
#include "core/dtype.h"
#include "core/operation.h"
#include "point_to_point/frame.h"
#include "transport/arena.h"

namespace pycomm {

/// One message as its sender or its receiver asked for it. The memory it names stays valid until it
/// is done.
struct Transfer {
  enum class Direction : std::uint8_t { kSend, kReceive };
  static constexpr int kAnySource = -1;
  /// Which no message of a user has.
  static constexpr int kPieceTag = -1;

  virtual ~Transfer() = default;

  Direction direction = Direction::kSend;
  /// Rank in the group; kAnySource: the earliest that comes, then who sent it.
  int peer = kAnySource;
  int tag = 0;
  DType dtype = DType::kUint8;
  std::size_t count = 0;
  Shape shape;
  std::byte* memory = nullptr;  // only read by a send
  /// The GPU, as CUDA numbers them here, on which the memory is; -1: the host's.
  int device = -1;
  /// What is on this stream when the message is issued comes before it.
  StreamAddress stream = 0;
  /// A receive into a slot may be posted long before its message: that may have fewer elements, its
  /// sender writes to the slot where it can, and the deadline counts from when somebody waits. Both
  /// ends of such a message say so.
  bool in_slot = false;
  /// Goes with a message to a slot, as in an RDMA write with immediate data.
  std::uint64_t immediate = 0;
  /// As of an Operation.
  const char* site = nullptr;
  std::shared_ptr<ArenaBlock> slot;  // that memory lies in: a receive's, on the host

  // Set by the group.
  std::shared_ptr<DeviceCall> device_call;  // if there is a device
  Clock::time_point began;
  double timeout_s = 0;

  // For the exchange.
  std::uint64_t id = 0;
  bool met = false;  // a send: the receive that will ask for it has told that it is ready
  std::size_t moved_bytes = 0;
  bool done = false;
  /// A receive: it read the sender's arena. Once the sender has failed its caller may have changed
  /// what was there.
  bool read_there = false;
  std::exception_ptr error;  // with which it is done, and which the group survives

  std::size_t bytes() const { return count * size_of(dtype); }
  /// Of a message between GPUs, on its way between the hosts: nobody else hears of it.
  bool is_piece() const { return tag == kPieceTag; }
  bool accepts(int source, int its_tag) const {
    return tag == its_tag && (peer == source || peer == kAnySource);
  }
  /// Whether a receive may be given this message. Its tag and sender do fit.
  bool takes(const Frame& message) const;
  /// The message this receive is for has come: `frame` says what it is.
  void got(int source, const Frame& message);
  /// What a frame says of its elements.
  Frame frame(Frame::Kind kind) const;
  /// "recv of 4096 float32, shape (64, 64), from rank 1, tag 3".
  std::string describe() const;
};

}  // namespace pycomm
