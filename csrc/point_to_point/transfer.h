#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/operation.h"
#include "point_to_point/frame.h"

namespace pycomm {

/// One message as its sender or its receiver asked for it. The memory it names stays valid until it
/// is done.
struct Transfer {
  enum class Direction : std::uint8_t { kSend, kReceive };
  static constexpr int kAnySource = -1;

  virtual ~Transfer() = default;

  Direction direction = Direction::kSend;
  /// Rank in the group; kAnySource: the earliest that comes, then who sent it.
  int peer = kAnySource;
  int tag = 0;
  DType dtype = DType::kUint8;
  std::size_t count = 0;
  Shape shape;
  std::byte* memory = nullptr;  // only read by a send

  // For the exchange.
  std::uint64_t id = 0;
  std::size_t moved_bytes = 0;
  bool done = false;

  std::size_t bytes() const { return count * size_of(dtype); }
  bool accepts(int source, int its_tag) const {
    return tag == its_tag && (peer == source || peer == kAnySource);
  }
  /// What a frame says of its elements.
  Frame frame(Frame::Kind kind) const;
  /// "recv of 4096 float32, shape (64, 64), from rank 1, tag 3".
  std::string describe() const;
};

}  // namespace pycomm
