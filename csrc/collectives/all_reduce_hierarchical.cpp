#include "collectives/all_reduce_hierarchical.h"

#include <algorithm>
#include <cstring>

#include "collectives/all_reduce_direct.h"
#include "collectives/all_reduce_ring.h"
#include "collectives/open.h"
#include "collectives/partition.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

class HierarchicalAllReduce {
 public:
  HierarchicalAllReduce(Context& context, const Operation& operation)
      : context_(context),
        operation_(operation),
        element_(size_of(operation.dtype)),
        lanes_(context.placement.lanes()),
        wire_dtype_(choose_wire_dtype()) {
    for (int peer = 0; peer < window().local_size(); ++peer) {
      all_in_arena_ &= window().announced_buffer(peer, context.sequence) != nullptr;
    }
  }

  Task<> run() {
    const std::size_t step = piece_count();
    for (std::size_t begin = 0; begin < operation_.count; begin += step) {
      const Range piece{begin, std::min(operation_.count, begin + step)};
      if (!all_in_arena_) {
        std::memcpy(window().staging(window().local_rank()) + context_.staging.input(),
                    operation_.input + piece.begin * element_, piece.count() * element_);
      }
      co_await meet(context_);
      if (window().local_rank() < lanes_) co_await reduce_share(piece);
      co_await meet(context_);
      copy_out(piece);
    }
  }

 private:
  Window& window() const { return context_.window; }

  DType choose_wire_dtype() const {
    std::size_t most = 0;
    for (const auto& ranks : context_.placement.hosts) most = std::max(most, ranks.size());
    const bool direct = operation_.algorithm != Algorithm::kRing;
    return most == 1 && direct ? operation_.dtype : accumulator_of(operation_.dtype);
  }

  /// Elements of one piece: as many as fit the staging regions. All hosts must come to the same
  /// number, so it does not depend on where this host's buffers lie.
  std::size_t piece_count() const {
    // direct exchange may receive one element a host more than its even part
    const auto hosts = static_cast<std::size_t>(context_.host_count());
    const std::size_t share = context_.staging.region_bytes() / size_of(wire_dtype_) - hosts;
    return std::min(share * static_cast<std::size_t>(lanes_),
                    context_.staging.region_bytes() / element_);
  }

  Range share(const Range& piece, int lane) const { return partition(piece.count(), lanes_, lane); }

  /// A local rank's input, from the piece's first element on.
  const std::byte* input_of(int peer, const Range& piece) const {
    if (!all_in_arena_) return window().staging(peer) + context_.staging.input();
    return window().announced_buffer(peer, context_.sequence) + piece.begin * element_;
  }

  Task<> reduce_share(const Range& piece) {
    const int index = window().local_rank();
    const Range mine = share(piece, index);
    std::byte* const staging = window().staging(index);
    std::vector<const std::byte*> sources;
    for (int peer = 0; peer < window().local_size(); ++peer) {
      sources.push_back(input_of(peer, piece) + mine.begin * element_);
    }
    std::byte* const host_sum = staging + context_.staging.host_sum();
    fold({operation_.dtype, wire_dtype_, operation_.op, 1}, host_sum, sources, mine.count());

    const Lane lane = context_.lane(index);
    const Share whole{host_sum,
                      staging + context_.staging.result(),
                      staging + context_.staging.received(),
                      mine.count(),
                      context_.staging.piece_bytes / 2,
                      {wire_dtype_, operation_.dtype, operation_.op,
                       std::max<std::int64_t>(1, operation_.divisor)}};
    if (operation_.algorithm == Algorithm::kRing) {
      co_await all_reduce_ring(lane, whole);
    } else {
      co_await all_reduce_direct(lane, whole);
    }
  }

  void copy_out(const Range& piece) const {
    for (int lane = 0; lane < lanes_; ++lane) {
      const Range theirs = share(piece, lane);
      std::memcpy(operation_.output + (piece.begin + theirs.begin) * element_,
                  window().staging(lane) + context_.staging.result(), theirs.count() * element_);
    }
  }

  Context& context_;
  const Operation& operation_;
  const std::size_t element_;
  const int lanes_;
  const DType wire_dtype_;
  bool all_in_arena_ = true;
};

}  // namespace

Task<> all_reduce_hierarchical(Context& context, const Operation& operation) {
  HierarchicalAllReduce run(context, operation);
  co_await run.run();
}

}  // namespace pycomm
