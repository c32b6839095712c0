#include "collectives/all_reduce_window.h"

#include <algorithm>
#include <cstring>

#include "collectives/open.h"
#include "collectives/partition.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

/// Two ranks never write the same cache line, nor the pair that the prefetcher takes.
constexpr std::size_t kPartGranuleBytes = 128;

FoldSpec fold_spec(const Operation& operation) {
  return {operation.dtype, operation.dtype, operation.op,
          std::max<std::int64_t>(1, operation.divisor)};
}

Range part_of(const Context& context, const Operation& operation, std::size_t count) {
  return partition(count, context.window.local_size(), context.window.local_rank(),
                   kPartGranuleBytes / size_of(operation.dtype));
}

/// Fold this rank's part of the buffers where they lie.
void fold_in_place(Context& context, const Operation& operation) {
  const Range part = part_of(context, operation, operation.count);
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    const auto at = static_cast<std::size_t>(peer);
    context.destinations[at] = context.window.announced_buffer(peer, context.sequence) +
                               part.begin * size_of(operation.dtype);
    context.sources[at] = context.destinations[at];
  }
  fold_to_all(fold_spec(operation), context.destinations, context.sources, part.count());
}

/// One operation's way through the staging slots.
class StagedAllReduce {
 public:
  StagedAllReduce(Context& context, const Operation& operation)
      : context_(context),
        operation_(operation),
        element_(size_of(operation.dtype)),
        piece_count_(context.staging.piece_bytes / element_) {}

  Task<> run() {
    const std::size_t pieces = (operation_.count + piece_count_ - 1) / piece_count_;
    copy_in(0);
    co_await meet(context_);
    for (std::size_t i = 0; i < pieces; ++i) {
      if (i + 1 < pieces) copy_in(i + 1);
      fold_part(i);
      co_await meet(context_);
      copy_out(i);
    }
  }

 private:
  Range piece(std::size_t i) const {
    return {i * piece_count_, std::min(operation_.count, (i + 1) * piece_count_)};
  }
  std::byte* slot(int peer, std::size_t i) const {
    return context_.window.staging(peer) + i % 3 * context_.staging.piece_bytes;
  }
  Range part(int peer, std::size_t i) const {
    return partition(piece(i).count(), context_.window.local_size(), peer,
                     kPartGranuleBytes / element_);
  }

  void copy_in(std::size_t i) {
    std::memcpy(slot(context_.window.local_rank(), i), operation_.input + piece(i).begin * element_,
                piece(i).count() * element_);
  }

  void fold_part(std::size_t i) {
    const int me = context_.window.local_rank();
    const Range mine = part(me, i);
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      context_.sources[static_cast<std::size_t>(peer)] = slot(peer, i) + mine.begin * element_;
    }
    std::byte* const destinations[] = {
        slot(me, i) + mine.begin * element_,
        operation_.output + (piece(i).begin + mine.begin) * element_};
    fold_to_all(fold_spec(operation_), destinations, context_.sources, mine.count());
  }

  void copy_out(std::size_t i) {
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      if (peer == context_.window.local_rank()) continue;
      const Range theirs = part(peer, i);
      std::memcpy(operation_.output + (piece(i).begin + theirs.begin) * element_,
                  slot(peer, i) + theirs.begin * element_, theirs.count() * element_);
    }
  }

  Context& context_;
  const Operation& operation_;
  const std::size_t element_;
  const std::size_t piece_count_;
};

}  // namespace

void all_reduce_announced(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    context.sources[static_cast<std::size_t>(peer)] =
        context.window.announced_payload(peer, context.sequence, bytes);
  }
  fold(fold_spec(operation), operation.output, context.sources, operation.count);
}

Task<> all_reduce_window(Context& context, const Operation& operation) {
  bool all_in_arena = true;
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    all_in_arena &= context.window.announced_buffer(peer, context.sequence) != nullptr;
  }
  if (all_in_arena) {
    fold_in_place(context, operation);
    co_await meet(context);
  } else {
    StagedAllReduce staged(context, operation);
    co_await staged.run();
  }
}

}  // namespace pycomm
