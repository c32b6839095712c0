#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/operation.h"

namespace pycomm {

/// What ranks tell each other to move one message. A frame may carry a payload behind it.
///
///   sender                                         receiver
///   kMessage: what it is, a small payload   --->   keeps it until a receive matches, then
///                                           <---   kRequest, or it reads the sender's arena
///   kData, a piece each, as slots are free  --->   copies each piece into place
///   or writes where the kRequest says, then:
///   kWritten                                --->
///                                           <---   kReceived, after reading the arena; or
///                                                  kRefused: its receive is for something else
///                                           <---   kCredit: room for as many small payloads more
///
/// Inside a host a receive into a slot says beforehand where its message may go, and how much:
///
///                                           <---   kReady
///   kPlaced, after writing there            --->
///
/// A kReady meets the oldest send to a slot with its tag that the receiver has not asked for yet,
/// so that one is announced already: then it is dropped, as both meet at the receiver. Hence what
/// goes to a slot never travels with its kMessage there, which would leave nothing to ask for.
///
/// What lies on GPUs never travels in frames: see GpuMail, whose frames kBatch and kProposal are.
/// Without NCCL its pieces do, as messages of their own (Transfer::kPieceTag).
struct Frame {
  enum class Kind : std::uint8_t {
    kMessage,
    kRequest,
    kData,
    kReceived,
    kRefused,
    kCredit,
    kBatch,
    kProposal,
    kWritten,
    kReady,
    kPlaced
  };
  static constexpr std::uint64_t kNowhere = ~std::uint64_t{0};
  /// A payload up to this long travels with its kMessage, whether anybody waits for it or not.
  static constexpr std::size_t kEagerBytes = 1024;
  /// Small payloads on their way from one rank to another or kept there; more are asked for first,
  /// as large ones are, so a receiver that never receives keeps descriptors only.
  static constexpr std::uint64_t kEagerMessages = 64;

  Kind kind = Kind::kMessage;
  DType dtype = DType::kUint8;
  std::int8_t dim_count = -1;
  // 0 or 1; no bool, since a receiver may look before it has checked that.
  std::uint8_t eager = 0;
  std::uint8_t on_gpu = 0;
  std::uint8_t in_slot = 0;
  std::int32_t tag = 0;
  /// Names a message of its sender.
  std::uint64_t id = 0;
  /// Elements; kCredit, kBatch: messages.
  std::uint64_t count = 0;
  /// Where the receiver can read all of it (kRequest, kReady: the sender can write it), or
  /// kNowhere.
  std::uint64_t address = kNowhere;
  std::uint64_t payload_bytes = 0;
  /// The sender's number that goes with a message to a slot.
  std::uint64_t immediate = 0;
  std::array<std::int64_t, Shape::kMaxDims> dims{};

  /// What a frame that came from a peer cannot be; null: it can be believed, but for what the
  /// receiver alone knows (its ids, its peer's arena). It looks at bytes: until they are checked
  /// they need not hold values of these types.
  ///
  /// @param bytes  sizeof(Frame) of them.
  /// @param room   how many bytes came behind it.
  static const char* problem(const std::byte* bytes, std::size_t room);

  /// Of `count` elements, which then do not overflow.
  std::uint64_t bytes() const { return count * size_of(dtype); }

  bool same_elements(const Frame& other) const {
    return on_gpu == other.on_gpu && in_slot == other.in_slot && dtype == other.dtype &&
           count == other.count && dim_count == other.dim_count && dims == other.dims;
  }
  /// "4096 float32, shape (64, 64), on a GPU".
  std::string elements() const;
};

}  // namespace pycomm
