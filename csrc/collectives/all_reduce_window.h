#pragma once

#include <cstdint>

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// An all-reduce inside one host goes one of three ways, which all ranks choose alike once they
/// have seen what every rank announced.
enum class HostWay : std::uint8_t {
  /// Small. Every rank shows its input beside its announcement, and folds everybody's in rank
  /// order: p reads of n bytes, no further step.
  kShown,
  /// Every rank's buffer lies in its arena and is read and written there. Rank r folds part r of
  /// all of them, in rank order:
  ///
  ///   announced | fold part r of all buffers, write it to all buffers | meet
  kInPlace,
  /// Otherwise pieces go through two staging slots a rank, one meeting for each piece (i counts
  /// pieces; slot i % 2). A rank copies in only what others fold; its own part is folded from where
  /// the user has it, to the user's output and into the slots of the others, which copy out of
  /// their own slot what others have folded. Piece 0 is copied in before the operation is
  /// announced:
  ///
  ///   copy in 0 | announced | copy in 1, fold part r of 0 | meet |
  ///                           copy out 0, copy in 2, fold part r of 1 | meet | ...
  ///
  /// Two slots: others write to slot i % 2 again only after the meeting behind copy in i+2, which
  /// follows copy out i. If some ranks' buffers lie in their arenas and others' do not, all ranks
  /// copy piece 0 in when they have seen that, and meet once more.
  kStaged,
};

/// Where `operation` lies in this rank's arena, for peers that read and write it there;
/// Announcement::kNotInArena: nowhere, or its output is elsewhere.
std::uint64_t in_place_offset(const Context& context, const Operation& operation);

/// Announce an all-reduce to the other ranks of its only host, and show what a peer will read
/// first. Writes nothing but memory that no peer touches between operations.
void announce_all_reduce(Context& context, const Operation& operation);

/// The way of the current operation, which every rank has announced.
HostWay way_of(const Context& context, const Operation& operation);

/// kShown, and a small reduce on its root: fold what every rank has shown.
void fold_shown(Context& context, const Operation& operation);

/// kInPlace up to the meeting: fold this rank's part, and say so.
void fold_in_place(Context& context, const Operation& operation);

/// All-reduce inside one host, from the moment when every rank has announced it. Goes on with one
/// that has been folded in place.
///
/// Cost for n bytes and p ranks: n read and n written by each rank in arena memory; through staging
/// (p-1)/p n copied in, n read and n written by the fold, (p-1)/p n copied out, and one meeting for
/// each piece.
Task<> all_reduce_window(Context& context, const Operation& operation);

/// Reduce inside one host: the staged way, but the root alone copies out, and inputs that all lie
/// in arenas (announced) are read there, so that nothing is copied in.
Task<> reduce_window(Context& context, const Operation& operation);

}  // namespace pycomm
