#include "collectives/all_reduce_window.h"

#include <algorithm>
#include <cstring>

#include "collectives/fold_specs.h"
#include "collectives/open.h"
#include "collectives/partition.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

/// Two ranks never write the same cache line, nor the pair that the prefetcher takes.
constexpr std::size_t kPartGranuleBytes = 128;

/// Three slots of it stay in a core's second-level cache until the others have read them.
constexpr std::size_t kPieceBytes = 256 << 10;

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
  fold_to_all(FoldSpecs::of(operation, context.placement).whole, context.destinations,
              context.sources, part.count());
}

bool all_in_arena(const Context& context) {
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    if (context.window.announced_buffer(peer, context.sequence) == nullptr) return false;
  }
  return true;
}

/// One operation's way through the staging slots.
class StagedReduction {
 public:
  /// @param reads_arenas  inputs are read where they were announced, not copied in.
  /// @param output        null on a rank that wants no result.
  StagedReduction(Context& context, const Operation& operation, bool reads_arenas,
                  std::byte* output)
      : context_(context),
        operation_(operation),
        reads_arenas_(reads_arenas),
        output_(output),
        spec_(FoldSpecs::of(operation, context.placement).whole),
        element_(size_of(operation.dtype)),
        me_(context.window.local_rank()),
        piece_count_(piece_bytes(context) / element_),
        sources_(static_cast<std::size_t>(context.window.local_size())) {}

  Task<> run() {
    const std::size_t pieces = (operation_.count + piece_count_ - 1) / piece_count_;
    if (!reads_arenas_) {
      copy_in(0);
      co_await meet(context_);
    }
    for (std::size_t i = 0; i < pieces; ++i) {
      if (!reads_arenas_ && i + 1 < pieces) copy_in(i + 1);
      fold_part(i);
      co_await meet(context_);
      if (output_ != nullptr) copy_out(i);
    }
  }

 private:
  static std::size_t piece_bytes(const Context& context) {
    return std::min(context.staging.piece_bytes, kPieceBytes);
  }

  Range piece(std::size_t i) const {
    return {i * piece_count_, std::min(operation_.count, (i + 1) * piece_count_)};
  }
  /// A rank's part of piece `i`, in elements of the buffer.
  Range part(int peer, std::size_t i) const {
    const Range whole = piece(i);
    const Range of_piece =
        partition(whole.count(), context_.window.local_size(), peer, kPartGranuleBytes / element_);
    return {whole.begin + of_piece.begin, whole.begin + of_piece.end};
  }
  /// Where a rank's slot holds the element at `begin`, which lies in piece `i`.
  std::byte* place(int peer, std::size_t i, std::size_t begin) const {
    return context_.window.staging(peer) + i % 3 * piece_bytes(context_) +
           (begin - piece(i).begin) * element_;
  }

  void copy_in(std::size_t i) const {
    const Range whole = piece(i);
    const Range mine = part(me_, i);
    for (const Range& theirs : {Range{whole.begin, mine.begin}, Range{mine.end, whole.end}}) {
      std::memcpy(place(me_, i, theirs.begin), operation_.input + theirs.begin * element_,
                  theirs.count() * element_);
    }
  }

  void fold_part(std::size_t i) {
    const Range mine = part(me_, i);
    const std::size_t offset = mine.begin * element_;
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      const std::byte*& source = sources_[static_cast<std::size_t>(peer)];
      if (peer == me_) {
        source = operation_.input + offset;
      } else if (reads_arenas_) {
        source = context_.window.announced_buffer(peer, context_.sequence) + offset;
      } else {
        source = place(peer, i, mine.begin);
      }
    }
    std::byte* const shown = place(me_, i, mine.begin);
    if (output_ == nullptr) {
      fold(spec_, shown, sources_, mine.count());
    } else {
      std::byte* const destinations[] = {shown, output_ + offset};
      fold_to_all(spec_, destinations, sources_, mine.count());
    }
  }

  void copy_out(std::size_t i) const {
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      if (peer == me_) continue;
      const Range theirs = part(peer, i);
      std::memcpy(output_ + theirs.begin * element_, place(peer, i, theirs.begin),
                  theirs.count() * element_);
    }
  }

  Context& context_;
  const Operation& operation_;
  const bool reads_arenas_;
  std::byte* const output_;
  const FoldSpec spec_;
  const std::size_t element_;
  const int me_;
  const std::size_t piece_count_;
  std::vector<const std::byte*> sources_;
};

}  // namespace

void all_reduce_announced(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    context.sources[static_cast<std::size_t>(peer)] =
        context.window.announced_payload(peer, context.sequence, bytes);
  }
  fold(FoldSpecs::of(operation, context.placement).whole, operation.output, context.sources,
       operation.count);
}

Task<> all_reduce_window(Context& context, const Operation& operation) {
  if (all_in_arena(context)) {
    fold_in_place(context, operation);
    co_await meet(context);
  } else {
    StagedReduction staged(context, operation, /*reads_arenas=*/false, operation.output);
    co_await staged.run();
  }
}

Task<> reduce_window(Context& context, const Operation& operation) {
  std::byte* const output = context.rank == operation.root ? operation.output : nullptr;
  StagedReduction staged(context, operation, all_in_arena(context), output);
  co_await staged.run();
}

}  // namespace pycomm
