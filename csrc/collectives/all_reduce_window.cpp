#include "collectives/all_reduce_window.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "collectives/fold_specs.h"
#include "collectives/open.h"
#include "collectives/partition.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

/// Two ranks never write the same cache line, nor the pair that the prefetcher takes.
constexpr std::size_t kPartGranuleBytes = 128;

/// Two slots, with what is copied to and from them, stay in a core's second-level cache. Much
/// smaller ones would be fetched from the peer's first-level cache, which takes longer. Two cores
/// of a Xeon of 2023, 1 MiB: 88 us with 256 KiB, 115 with 64, 147 with 16.
constexpr std::size_t kSlotBytes = 256 << 10;

/// Up to here two ranks show what they reduce even if both have it in their arenas: the meeting
/// behind a fold in place takes longer than this copy. With more ranks it is always so.
constexpr std::size_t kShownByTwoBytes = 2048;

std::size_t bytes_of(const Operation& operation) {
  return operation.count * size_of(operation.dtype);
}

/// How long a payload is shown although its buffer lies in an arena; the same on every rank.
std::size_t most_shown_bytes(const Context& context) {
  return context.window.local_size() == 2 ? kShownByTwoBytes : Announcement::kEagerBytes;
}

std::byte* announced_buffer(const Context& context, const Operation& operation, int peer) {
  return context.window.announced_buffer(peer, context.sequence, bytes_of(operation));
}

int count_in_arenas(const Context& context, const Operation& operation) {
  int count = 0;
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    if (announced_buffer(context, operation, peer) != nullptr) ++count;
  }
  return count;
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
        slot_bytes_(std::min(kSlotBytes, context.staging.early_bytes())),
        piece_count_(slot_bytes_ / element_) {}

  static constexpr int kAllRanks = -1;

  /// Before the operation is announced: copy in piece 0.
  void prepare() const { copy_in(0); }

  /// @param prepared  every rank has been, before it announced the operation.
  Task<> run(bool prepared) {
    const std::size_t pieces = (operation_.count + piece_count_ - 1) / piece_count_;
    const std::size_t fold_step = reads_arenas_ ? 0 : 1;
    const std::size_t copy_out_step = fold_step + 1;
    for (std::size_t step = prepared ? 1 : 0; step < pieces + copy_out_step; ++step) {
      if (step > (prepared ? 1 : 0)) co_await meet(context_);
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
  /// Where a rank's slot holds the element at `begin`, which lies in piece `i`. When a rank has
  /// copied out its last piece, or met the others after it, nobody touches its slots any more.
  std::byte* place(int peer, std::size_t i, std::size_t begin) const {
    std::byte* const slot =
        i % 2 == 0 ? context_.window.early(peer) : context_.window.staging(peer);
    return slot + (begin - piece(i).begin) * element_;
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
    std::size_t results = 0;
    if (wants_result(me_)) context_.destinations[results++] = operation_.output + offset;
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      const std::byte*& source = context_.sources[static_cast<std::size_t>(peer)];
      if (peer == me_) {
        source = operation_.input + offset;
        continue;
      }
      std::byte* const slot = place(peer, i, mine.begin);
      source = reads_arenas_ ? announced_buffer(context_, operation_, peer) + offset : slot;
      if (wants_result(peer)) context_.destinations[results++] = slot;
    }
    fold_to_all(spec_, std::span(context_.destinations).first(results), context_.sources,
                mine.count());
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
};

}  // namespace

std::uint64_t in_place_offset(const Context& context, const Operation& operation) {
  if (operation.input != operation.output) return Announcement::kNotInArena;
  return context.arena_offset(operation.input, bytes_of(operation));
}

void announce_all_reduce(Context& context, const Operation& operation) {
  const std::size_t bytes = bytes_of(operation);
  const std::uint64_t offset = in_place_offset(context, operation);
  if (bytes <= most_shown_bytes(context) ||
      (bytes <= Announcement::kEagerBytes && offset == Announcement::kNotInArena)) {
    announce(context, operation, Announcement::kNotInArena, {operation.input, bytes});
    return;
  }
  if (offset == Announcement::kNotInArena) {
    context.window.check_notices();
    StagedReduction(context, operation, /*reads_arenas=*/false, StagedReduction::kAllRanks)
        .prepare();
  }
  announce(context, operation, offset, {});
}

HostWay way_of(const Context& context, const Operation& operation) {
  const std::size_t bytes = bytes_of(operation);
  if (bytes <= most_shown_bytes(context)) return HostWay::kShown;
  const int in_arenas = count_in_arenas(context, operation);
  if (in_arenas == context.window.local_size()) return HostWay::kInPlace;
  return bytes <= Announcement::kEagerBytes && in_arenas == 0 ? HostWay::kShown : HostWay::kStaged;
}

void fold_shown(Context& context, const Operation& operation) {
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    context.sources[static_cast<std::size_t>(peer)] =
        context.window.announced_payload(peer, context.sequence, bytes_of(operation));
  }
  fold(FoldSpecs::of(operation, context.placement).whole, operation.output, context.sources,
       operation.count);
}

void fold_in_place(Context& context, const Operation& operation) {
  const std::size_t element = size_of(operation.dtype);
  const Range part = partition(operation.count, context.window.local_size(),
                               context.window.local_rank(), kPartGranuleBytes / element);
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    const auto at = static_cast<std::size_t>(peer);
    context.destinations[at] = announced_buffer(context, operation, peer) + part.begin * element;
    context.sources[at] = context.destinations[at];
  }
  fold_to_all(FoldSpecs::of(operation, context.placement).whole, context.destinations,
              context.sources, part.count());
  context.folded = context.sequence;
  context.window.complete_phase();
}

Task<> all_reduce_window(Context& context, const Operation& operation) {
  switch (way_of(context, operation)) {
    case HostWay::kShown:
      fold_shown(context, operation);
      break;
    case HostWay::kInPlace: {
      if (context.folded < context.sequence) fold_in_place(context, operation);
      Window::AllCompleted completed(context.window);
      co_await until(completed);
      break;
    }
    case HostWay::kStaged: {
      StagedReduction staged(context, operation, /*reads_arenas=*/false,
                             StagedReduction::kAllRanks);
      const bool prepared = bytes_of(operation) > Announcement::kEagerBytes &&
                            count_in_arenas(context, operation) == 0;
      co_await staged.run(prepared);
    }
  }
}

Task<> reduce_window(Context& context, const Operation& operation) {
  const bool reads_arenas = count_in_arenas(context, operation) == context.window.local_size();
  StagedReduction staged(context, operation, reads_arenas, operation.root);
  co_await staged.run(/*prepared=*/false);
}

}  // namespace pycomm
