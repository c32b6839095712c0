#include <algorithm>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/rank_list.h"
#include "group/group.h"
#include "group/process.h"

namespace pycomm {
namespace {

/// What split() tells the other ranks.
struct Wish {
  std::int64_t color;
  std::int64_t key;
  std::int64_t has_color;
};

}  // namespace

/// Collects `bytes` bytes from every rank of this group, by rank.
void Group::all_gather_records(const void* mine, void* all, std::size_t bytes, std::string name,
                               const InterruptCheck& check_interrupt) {
  Operation operation;
  operation.kind = Kind::kAllGather;
  operation.count = bytes;
  operation.input = static_cast<const std::byte*>(mine);
  operation.output = static_cast<std::byte*>(all);
  operation.name = std::move(name);
  run(std::move(operation), check_interrupt);
}

std::shared_ptr<Group> Group::create_from(const std::vector<int>& members, const std::string& call,
                                          const InterruptCheck& check_interrupt) {
  // Ranks outside the new group take part too: who is in it may next make a group with them, and
  // all must still agree on the lowest free tag.
  std::vector<GroupRecord> all(ranks_.size());
  const auto gather = [&](const GroupRecord& mine) {
    all_gather_records(&mine, all.data(), sizeof(mine), call, check_interrupt);
    std::int64_t free_tag = 0;
    for (const GroupRecord& record : all) free_tag = std::max(free_tag, record.free_tag);
    for (GroupRecord& record : all) record.free_tag = free_tag;
    std::vector<GroupRecord> theirs;
    for (const int member : members) theirs.push_back(all[static_cast<std::size_t>(member)]);
    return theirs;
  };
  if (std::find(members.begin(), members.end(), rank()) == members.end()) {
    const auto only_one = process_->begin_group();
    gather({0, process_->free_tag.load()});
    process_->free_tag = all.front().free_tag + kTagsOfAGroup;
    return nullptr;
  }
  std::vector<int> world_ranks;
  for (const int member : members) world_ranks.push_back(context_.world_rank(member));
  return create(process_, std::move(world_ranks), gather, timeout_s_);
}

std::shared_ptr<Group> Group::new_group(const std::vector<int>& ranks,
                                        const InterruptCheck& check_interrupt) {
  const std::string call = "new_group([" + rank_list(ranks) + "])";
  const auto refuse = [&](const std::string& problem) {
    throw InvalidArgumentError(call + " on rank " + std::to_string(rank()) + ": " + problem);
  };
  if (ranks.empty()) refuse("no ranks.\n  Name at least one; a rank outside the list gets None.");
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] < 0 || ranks[i] >= size()) {
      refuse("rank " + std::to_string(ranks[i]) + " is not in the group, which has ranks 0 to " +
             std::to_string(size() - 1) + ".\n  Name ranks of the group it is made from.");
    }
    if (std::find(ranks.begin(), ranks.begin() + static_cast<std::ptrdiff_t>(i), ranks[i]) !=
        ranks.begin() + static_cast<std::ptrdiff_t>(i)) {
      refuse("rank " + std::to_string(ranks[i]) + " appears twice.\n  Name each rank once.");
    }
  }
  // The list is the operation's name, hence part of its signature: two that differ are a mismatch.
  return create_from(ranks, call, check_interrupt);
}

std::shared_ptr<Group> Group::split(std::optional<std::int64_t> color, std::int64_t key,
                                    const InterruptCheck& check_interrupt) {
  const Wish mine{color.value_or(0), key, color.has_value()};
  std::vector<Wish> wishes(ranks_.size());
  all_gather_records(&mine, wishes.data(), sizeof(mine), "split", check_interrupt);
  std::vector<int> members;
  for (int other = 0; color && other < size(); ++other) {
    const Wish& wish = wishes[static_cast<std::size_t>(other)];
    if (wish.has_color != 0 && wish.color == *color) members.push_back(other);
  }
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
    return wishes[static_cast<std::size_t>(a)].key < wishes[static_cast<std::size_t>(b)].key;
  });
  return create_from(members, "split", check_interrupt);
}

std::shared_ptr<Group> Group::duplicate(const InterruptCheck& check_interrupt) {
  std::vector<int> everyone(ranks_.size());
  for (int rank = 0; rank < size(); ++rank) everyone[static_cast<std::size_t>(rank)] = rank;
  return create_from(everyone, "duplicate", check_interrupt);
}

}  // namespace pycomm
