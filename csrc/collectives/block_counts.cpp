#include "collectives/block_counts.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "collectives/open.h"
#include "core/error.h"

namespace pycomm {
namespace {

std::uint64_t entry(const std::vector<std::size_t>& counts, std::size_t count, int rank) {
  return counts.empty() ? count : counts[static_cast<std::size_t>(rank)];
}

}  // namespace

BlockCounts::BlockCounts(Context& context, const Operation& operation)
    : context_(context), operation_(operation) {
  // Two tables in the first half of the staging, what arrives from one rank in the second.
  const std::size_t table_bytes =
      2 * static_cast<std::size_t>(context.size()) * sizeof(std::uint64_t);
  if (table_bytes > context.window.staging_bytes() / 2) {
    throw CommError("all_to_all: the counts of " + std::to_string(context.size()) +
                    " ranks do not fit half of the " +
                    std::to_string(context.window.staging_bytes()) +
                    " bytes of staging. Use equal blocks, or a smaller group.");
  }
}

Task<> BlockCounts::agree() {
  show();
  co_await meet(context_);
  for (const int sender : context_.ranks_of(context_.host())) {
    for (const int receiver : context_.ranks_of(context_.host())) {
      const int from = context_.placement.local_rank_of[static_cast<std::size_t>(sender)];
      const int to = context_.placement.local_rank_of[static_cast<std::size_t>(receiver)];
      compare(sender, receiver, sent_by(from)[position_of(receiver)],
              expected_by(to)[position_of(sender)]);
    }
  }
  if (context_.host_count() > 1) {
    if (context_.window.local_rank() == 0) {
      co_await compare_between_hosts();
      co_await spread();
    } else {
      difference_ = kNone;  // the first rank says what all of them raise
    }
  }
  if (difference_.sender != kNone.sender) {
    throw MismatchError(
        "call #" + std::to_string(context_.sequence) + " (all_to_all) differs: rank " +
        std::to_string(difference_.sender) + " sends " + std::to_string(difference_.sent) +
        " elements to rank " + std::to_string(difference_.receiver) + ", which expects " +
        std::to_string(difference_.expected) +
        ".\n  Entry s of rank r's output splits must be entry r of rank s's input splits (above "
        "they "
        "are counted in elements). Exchange the splits first, with an all_to_all of one number for "
        "each rank, or leave output_splits out of all_to_all(), which then does it.");
  }
  if (context_.host_count() > 1) co_await meet(context_);  // the first rank has no objection
}

void BlockCounts::show() const {
  auto* const table =
      reinterpret_cast<std::uint64_t*>(context_.window.staging(context_.window.local_rank()));
  const auto ranks = static_cast<std::size_t>(context_.size());
  for (int rank = 0; rank < context_.size(); ++rank) {
    table[position_of(rank)] = entry(operation_.input_counts, operation_.count, rank);
    table[ranks + position_of(rank)] = entry(operation_.output_counts, operation_.count, rank);
  }
}

const std::uint64_t* BlockCounts::sent_by(int peer) const {
  return reinterpret_cast<const std::uint64_t*>(context_.window.staging(peer));
}

const std::uint64_t* BlockCounts::expected_by(int peer) const {
  return sent_by(peer) + context_.size();
}

std::size_t BlockCounts::first_of(int host) const {
  std::size_t position = 0;
  for (int before = 0; before < host; ++before) position += context_.ranks_of(before).size();
  return position;
}

std::size_t BlockCounts::position_of(int rank) const {
  const auto at = static_cast<std::size_t>(rank);
  return first_of(context_.placement.host_of[at]) +
         static_cast<std::size_t>(context_.placement.local_rank_of[at]);
}

void BlockCounts::compare(int sender, int receiver, std::uint64_t sent, std::uint64_t expected) {
  if (sent != expected && std::pair<std::int64_t, std::int64_t>(sender, receiver) <
                              std::pair(difference_.sender, difference_.receiver)) {
    difference_ = {sender, receiver, sent, expected};
  }
}

Task<> BlockCounts::compare_between_hosts() {
  const Lane lane = context_.lane(0);
  const std::size_t half = context_.window.staging_bytes() / 2;
  auto* const arrived = reinterpret_cast<std::uint64_t*>(context_.window.staging(0) + half);
  const auto& mine = context_.ranks_of(context_.host());
  for (int round = 1; round < lane.host_count(); ++round) {
    const int to = lane.wrap(lane.host + round);
    const auto& theirs = context_.ranks_of(lane.wrap(lane.host - round));
    // One message for each rank of the sending host: its counts for the receiving host's ranks.
    std::vector<std::unique_ptr<Message>> sent;
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      const auto* const row = reinterpret_cast<const std::byte*>(sent_by(peer) + first_of(to));
      sent.push_back(lane.send(to, {row, context_.ranks_of(to).size() * sizeof(std::uint64_t)}));
    }
    for (const int sender : theirs) {
      const auto received = lane.receive(lane.host - round, {reinterpret_cast<std::byte*>(arrived),
                                                             mine.size() * sizeof(std::uint64_t)});
      co_await until(*received);
      for (int peer = 0; peer < context_.window.local_size(); ++peer) {
        compare(sender, mine[static_cast<std::size_t>(peer)],
                arrived[static_cast<std::size_t>(peer)], expected_by(peer)[position_of(sender)]);
      }
    }
    for (const auto& message : sent) co_await until(*message);
  }
}

Task<> BlockCounts::spread() {
  const Lane lane = context_.lane(0);
  const std::size_t half = context_.window.staging_bytes() / 2;
  const std::span<std::byte> outgoing(context_.window.staging(0) + half, sizeof(Difference));
  const std::span<std::byte> arriving(outgoing.data() + sizeof(Difference), sizeof(Difference));
  for (int distance = 1; distance < lane.host_count(); distance *= 2) {
    std::memcpy(outgoing.data(), &difference_, sizeof(Difference));
    const auto received = lane.receive(lane.host - distance, arriving);
    const auto sent = lane.send(lane.host + distance, outgoing);
    co_await until(*received);
    co_await until(*sent);
    Difference theirs;
    std::memcpy(&theirs, arriving.data(), sizeof(theirs));
    if (theirs.sender != kNone.sender) {
      compare(static_cast<int>(theirs.sender), static_cast<int>(theirs.receiver), theirs.sent,
              theirs.expected);
    }
  }
}

std::size_t BlockCounts::longest_local() const {
  std::uint64_t longest = 0;
  for (int peer = 0; peer < context_.window.local_size(); ++peer) {
    const std::uint64_t* const row = sent_by(peer) + first_of(context_.host());
    longest = std::max(longest, *std::max_element(row, row + context_.window.local_size()));
  }
  return static_cast<std::size_t>(longest);
}

std::size_t BlockCounts::elements_before_mine(int rank) const {
  const int peer = context_.placement.local_rank_of[static_cast<std::size_t>(rank)];
  std::size_t elements = 0;
  for (int other = 0; other < context_.rank; ++other) elements += sent_by(peer)[position_of(other)];
  return elements;
}

Task<> compare_block_counts(Context& context, const Operation& operation) {
  BlockCounts counts(context, operation);
  if (context.host_count() > 1) co_await meet(context);  // all have read the opening's sums there
  co_await counts.agree();
  co_await meet(context);
}

}  // namespace pycomm
