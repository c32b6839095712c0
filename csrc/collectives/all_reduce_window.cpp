#include "collectives/all_reduce_window.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "collectives/fold_specs.h"
#include "collectives/open.h"
#include "collectives/partition.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

/// Two ranks never write the same cache line, nor the pair that the prefetcher takes.
constexpr std::size_t kPartGranuleBytes = 128;

/// Two slots, with what is copied to and from them, stay in a core's second-level cache. Much
/// smaller ones would be fetched from the peer's first-level cache, which takes longer (1 MiB, two
/// cores of a Xeon of 2023: 88 us with 256 KiB, 115 with 64, 147 with 16).
constexpr std::size_t kSlotBytes = 256 << 10;
constexpr std::size_t kSlots = 2;

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

/// One operation's way through the staging slots. The finished part goes back into the slots it was
/// read from: writing a line just read costs half of writing one that its readers still hold.
class StagedReduction {
 public:
  /// @param reads_arenas  inputs are read where they were announced, not copied in.
  /// @param root          the one rank that wants the result; kAllRanks: each does.
  StagedReduction(Context& context, const Operation& operation, bool reads_arenas, int root)
      : context_(context),
        operation_(operation),
        reads_arenas_(reads_arenas),
        root_(root),
        spec_(FoldSpecs::of(operation, context.placement).whole),
        element_(size_of(operation.dtype)),
        me_(context.window.local_rank()),
        slot_bytes_(std::min(kSlotBytes, context.window.staging_bytes() / kSlots / 64 * 64)),
        piece_count_(slot_bytes_ / element_),
        sources_(static_cast<std::size_t>(context.window.local_size())) {}

  static constexpr int kAllRanks = -1;

  Task<> run() {
    const std::size_t pieces = (operation_.count + piece_count_ - 1) / piece_count_;
    const std::size_t fold_step = reads_arenas_ ? 0 : 1;
    const std::size_t copy_out_step = fold_step + 1;
    for (std::size_t step = 0; step < pieces + copy_out_step; ++step) {
      if (step > 0) co_await meet(context_);
      if (step >= copy_out_step && wants_result(me_)) copy_out(step - copy_out_step);
      if (step < pieces && !reads_arenas_) copy_in(step);
      if (step >= fold_step && step - fold_step < pieces) fold_part(step - fold_step);
    }
  }

 private:
  bool wants_result(int peer) const {
    return root_ == kAllRanks || context_.window.group_rank(peer) == root_;
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
    return context_.window.staging(peer) + i % kSlots * slot_bytes_ +
           (begin - piece(i).begin) * element_;
  }

  /// Visits what the others fold of piece `i`: all but this rank's part.
  template <typename Body>
  void for_parts_of_others(std::size_t i, const Body& body) const {
    const Range whole = piece(i);
    const Range mine = part(me_, i);
    for (const Range& theirs : {Range{whole.begin, mine.begin}, Range{mine.end, whole.end}}) {
      if (theirs.count() > 0) {
        body(place(me_, i, theirs.begin), theirs.begin * element_, theirs.count() * element_);
      }
    }
  }
  void copy_in(std::size_t i) const {
    for_parts_of_others(i, [&](std::byte* slot, std::size_t offset, std::size_t bytes) {
      std::memcpy(slot, operation_.input + offset, bytes);
    });
  }
  void copy_out(std::size_t i) const {
    for_parts_of_others(i, [&](const std::byte* slot, std::size_t offset, std::size_t bytes) {
      std::memcpy(operation_.output + offset, slot, bytes);
    });
  }

  void fold_part(std::size_t i) {
    const Range mine = part(me_, i);
    const std::size_t offset = mine.begin * element_;
    destinations_.clear();
    if (wants_result(me_)) destinations_.push_back(operation_.output + offset);
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      const std::byte*& source = sources_[static_cast<std::size_t>(peer)];
      if (peer == me_) {
        source = operation_.input + offset;
        continue;
      }
      std::byte* const slot = place(peer, i, mine.begin);
      source =
          reads_arenas_ ? context_.window.announced_buffer(peer, context_.sequence) + offset : slot;
      if (wants_result(peer)) destinations_.push_back(slot);
    }
    fold_to_all(spec_, destinations_, sources_, mine.count());
  }

  Context& context_;
  const Operation& operation_;
  const bool reads_arenas_;
  const int root_;
  const FoldSpec spec_;
  const std::size_t element_;
  const int me_;
  const std::size_t slot_bytes_;
  const std::size_t piece_count_;
  std::vector<const std::byte*> sources_;
  std::vector<std::byte*> destinations_;
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
    StagedReduction staged(context, operation, /*reads_arenas=*/false, StagedReduction::kAllRanks);
    co_await staged.run();
  }
}

Task<> reduce_window(Context& context, const Operation& operation) {
  StagedReduction staged(context, operation, all_in_arena(context), operation.root);
  co_await staged.run();
}

}  // namespace pycomm
