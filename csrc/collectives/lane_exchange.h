#pragma once

#include <cstddef>
#include <memory>

#include "collectives/lane_stream.h"
#include "core/operation.h"
#include "core/task.h"
#include "kernels/fold.h"

namespace pycomm {

/// One lane's share of a piece of an all-reduce between hosts.
struct Share {
  /// This host's sum, `count` elements of `fold.source_dtype`. The ring overwrites it.
  std::byte* host_sum;
  /// Room for what is received: LaneExchange::received_bytes().
  std::byte* received;
  /// The result, `count` elements of `fold.destination_dtype`. May be `host_sum` if both dtypes are
  /// the same: whoever sends a part of the result has received that part of the host's sum.
  std::byte* result;
  std::size_t count;
  /// From hosts' sums to the result.
  FoldSpec fold;

  std::size_t wire() const { return size_of(fold.source_dtype); }
  std::size_t element() const { return size_of(fold.destination_dtype); }
};

/// An algorithm at work on one share, in two halves, between which a host's ranks meet.
class LaneExchange {
 public:
  virtual ~LaneExchange() = default;

  /// Hand the stream all messages that wait for no other. Nothing of the result is written.
  virtual void begin() = 0;

  /// Write the result, but for what the last receives of the stream still bring.
  virtual Task<> finish() = 0;

  /// @param algorithm  not kAuto.
  static std::unique_ptr<LaneExchange> make(Algorithm algorithm, LaneStream& stream,
                                            const Share& share);

  /// Room that `algorithm` needs to receive for a share of `count` elements of `wire` bytes.
  static constexpr std::size_t received_bytes(Algorithm algorithm, std::size_t count,
                                              std::size_t wire, int hosts) {
    const auto h = static_cast<std::size_t>(hosts);
    // chunks differ by one element: h-1 of them may be longer than their even part
    return algorithm == Algorithm::kGatherFold ? h * count * wire : (count + h) * wire;
  }
};

}  // namespace pycomm
