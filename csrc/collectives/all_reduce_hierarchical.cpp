#include "collectives/all_reduce_hierarchical.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "collectives/lane_exchange.h"
#include "collectives/open.h"
#include "collectives/partition.h"
#include "collectives/piece_plan.h"
#include "core/error.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

class HierarchicalAllReduce {
 public:
  HierarchicalAllReduce(Context& context, const Operation& operation, Algorithm algorithm)
      : context_(context),
        operation_(operation),
        algorithm_(algorithm),
        element_(size_of(operation.dtype)),
        lanes_(context.placement.lanes()),
        wire_dtype_(wire_dtype(context.job_of(operation), algorithm)),
        sum_is_input_(context.placement.most_ranks() == 1 && wire_dtype_ == operation.dtype),
        plan_(PiecePlan::of(context.staging, algorithm, element_, size_of(wire_dtype_),
                            context.host_count(), lanes_, sum_is_input_)),
        stream_(context.lane(is_lane() ? me() : 0)) {
    if (!plan_.fits(element_, lanes_)) {
      throw InvalidArgumentError(std::string("all_reduce: the staging memory (") +
                                 std::to_string(context.staging.bytes(context.host_count())) +
                                 " bytes) holds no element of " +
                                 std::to_string(context.host_count()) + " hosts by algorithm " +
                                 name_of(algorithm) + ". Use direct or ring.");
    }
    const std::size_t bytes = operation.count * element_;
    for (int peer = 0; peer < window().local_size(); ++peer) {
      all_in_arena_ &= window().announced_buffer(peer, context.sequence, bytes) != nullptr;
    }
    in_place_ = sum_is_input_ && all_in_arena_;
  }

  Task<> run() {
    const std::size_t pieces = (operation_.count + plan_.piece_count - 1) / plan_.piece_count;
    if (pieces == 0) co_return;
    copy_in(0);
    co_await meet(context_);  // every rank's first piece is shown
    begin_exchange(0);
    for (std::size_t i = 0; i < pieces; ++i) {
      if (i > 1) copy_out(i - 2);
      LaneStream::Over over(stream_, end_.sends, end_.receives);
      co_await until(over);  // exchange i-1, whose half piece i+1 takes
      if (i + 1 < pieces) copy_in(i + 1);
      co_await meet_meanwhile();
      if (is_lane()) co_await exchanges_[i % 2]->finish();
      end_ = {stream_.last_send(), stream_.last_receive()};
      if (i + 1 < pieces) begin_exchange(i + 1);
    }
    auto over = stream_.all_over();
    co_await until(over);
    if (pieces > 1) copy_out(pieces - 2);
    co_await meet_meanwhile();
    copy_out(pieces - 1);
  }

 private:
  /// When an exchange is over.
  struct End {
    LaneStream::Ticket sends = 0;
    LaneStream::Ticket receives = 0;
  };

  Window& window() const { return context_.window; }
  int me() const { return window().local_rank(); }
  bool is_lane() const { return me() < lanes_; }

  Range piece(std::size_t i) const {
    return {i * plan_.piece_count, std::min(operation_.count, (i + 1) * plan_.piece_count)};
  }
  Range share(std::size_t i, int lane) const { return partition(piece(i).count(), lanes_, lane); }
  std::byte* half(int peer, std::size_t i) const {
    return window().staging(peer) + i % 2 * plan_.half_bytes;
  }

  Task<> meet_meanwhile() {
    window().complete_phase();
    Window::AllCompleted here(window());
    LaneStream::While both(stream_, here);
    co_await until(both);
  }

  /// A local rank's input, from the piece's first element on.
  const std::byte* input_of(int peer, std::size_t i) const {
    if (!all_in_arena_) return half(peer, i);
    const std::size_t bytes = operation_.count * element_;
    return window().announced_buffer(peer, context_.sequence, bytes) + piece(i).begin * element_;
  }

  void copy_in(std::size_t i) const {
    if (all_in_arena_) return;
    std::memcpy(half(me(), i), operation_.input + piece(i).begin * element_,
                piece(i).count() * element_);
  }

  void begin_exchange(std::size_t i) {
    if (!is_lane()) return;
    const Range mine = share(i, me());
    std::byte* const staging = half(me(), i);
    Share share{staging + plan_.host_sum,
                staging + plan_.received,
                staging + plan_.result,
                mine.count(),
                {wire_dtype_, operation_.dtype, operation_.op,
                 std::max<std::int64_t>(1, operation_.divisor), 1, operation_.postscale}};
    if (in_place_) {
      share.host_sum = share.result = operation_.output + piece(i).begin * element_;
    }
    if (sum_is_input_ && algorithm_ != Algorithm::kRing) {
      share.fold.prescale = operation_.prescale;  // the only fold there is
    } else if (!sum_is_input_ || operation_.prescale != 1) {
      std::vector<const std::byte*> sources;
      for (int peer = 0; peer < window().local_size(); ++peer) {
        sources.push_back(input_of(peer, i) + mine.begin * element_);
      }
      fold({operation_.dtype, wire_dtype_, operation_.op, 1, operation_.prescale}, share.host_sum,
           sources, mine.count());
    }
    exchanges_[i % 2] = LaneExchange::make(algorithm_, stream_, share);
    exchanges_[i % 2]->begin();
  }

  void copy_out(std::size_t i) const {
    if (in_place_) return;
    for (int lane = 0; lane < lanes_; ++lane) {
      const Range theirs = share(i, lane);
      std::memcpy(operation_.output + (piece(i).begin + theirs.begin) * element_,
                  half(lane, i) + plan_.result, theirs.count() * element_);
    }
  }

  Context& context_;
  const Operation& operation_;
  const Algorithm algorithm_;
  const std::size_t element_;
  const int lanes_;
  const DType wire_dtype_;
  const bool sum_is_input_;
  const PiecePlan plan_;
  bool all_in_arena_ = true;
  bool in_place_ = false;
  LaneStream stream_;
  std::array<std::unique_ptr<LaneExchange>, 2> exchanges_;  // of even and of odd pieces
  End end_;                                                 // of the latest finished exchange
};

}  // namespace

Task<> all_reduce_hierarchical(Context& context, const Operation& operation, Algorithm algorithm) {
  HierarchicalAllReduce run(context, operation, algorithm);
  co_await run.run();
}

}  // namespace pycomm
