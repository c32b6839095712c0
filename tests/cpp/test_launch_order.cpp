#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "nccl/launch_order.h"

using pycomm::nccl::LaunchOrder;

namespace {

/// Ranks with overlapping groups, whose agreements take any time: each step moves one random call
/// of one random rank along, if it can move.
class Job {
 public:
  Job(int ranks, std::vector<std::vector<int>> groups, unsigned seed)
      : random_(seed), ranks_(static_cast<std::size_t>(ranks)), groups_(std::move(groups)) {
    for (auto& rank : ranks_) rank.calls.resize(groups_.size());
  }

  /// Until every group has made `calls` calls; false if nothing moves any more.
  bool run(int calls) {
    const std::size_t wanted = groups_.size() * static_cast<std::size_t>(calls);
    for (int idle = 0; idle < 20000; ++idle) {
      const std::size_t group = random_() % groups_.size();
      const auto& members = groups_[group];
      const auto rank = static_cast<std::size_t>(members[random_() % members.size()]);
      if (step(ranks_[rank], group, calls)) idle = 0;
      if (done_.size() == wanted) return true;
    }
    return false;
  }

  const std::vector<std::vector<std::uint64_t>>& launched() {
    launched_.clear();
    for (const auto& rank : ranks_) launched_.push_back(rank.launched);
    return launched_;
  }

 private:
  enum class Stage { kIdle, kProposed, kAgreed };
  struct Call {
    Stage stage = Stage::kIdle;
    std::uint64_t number = 0;  // of the group's calls
  };
  struct Rank {
    LaunchOrder order;
    std::vector<Call> calls;              // the current one of each group
    std::vector<std::uint64_t> launched;  // group * 1000 + number
  };

  bool step(Rank& rank, std::size_t group, int calls) {
    Call& call = rank.calls[group];
    const std::uint64_t id = group * 1000 + call.number;
    switch (call.stage) {
      case Stage::kIdle:
        if (call.number == static_cast<std::uint64_t>(calls)) return false;
        proposals_[id].push_back(rank.order.propose(group));
        call.stage = Stage::kProposed;
        return true;
      case Stage::kProposed: {
        const auto& proposals = proposals_[id];
        if (proposals.size() < groups_[group].size()) return false;
        rank.order.agree(group, *std::max_element(proposals.begin(), proposals.end()));
        call.stage = Stage::kAgreed;
        return true;
      }
      case Stage::kAgreed:
        if (!rank.order.is_next(group)) return false;
        rank.order.leave(group);
        rank.launched.push_back(id);
        if (++launches_[id] == groups_[group].size()) done_.push_back(id);
        call = {Stage::kIdle, call.number + 1};
        return true;
    }
    return false;
  }

  std::mt19937 random_;
  std::vector<Rank> ranks_;
  const std::vector<std::vector<int>> groups_;
  std::map<std::uint64_t, std::vector<std::uint64_t>> proposals_;
  std::map<std::uint64_t, std::size_t> launches_;
  std::vector<std::uint64_t> done_;
  std::vector<std::vector<std::uint64_t>> launched_;
};

/// Whether the GPUs could run this: a kernel ends once it is at the head on all its ranks, as with
/// one stream a GPU. Any cycle among the ranks' orders stops it.
bool runs(std::vector<std::vector<std::uint64_t>> streams) {
  std::vector<std::size_t> heads(streams.size());
  for (;;) {
    bool moved = false;
    bool over = true;
    for (std::size_t rank = 0; rank < streams.size(); ++rank) {
      if (heads[rank] == streams[rank].size()) continue;
      over = false;
      const std::uint64_t kernel = streams[rank][heads[rank]];
      const auto at_head = [&](std::size_t other) {
        const auto& stream = streams[other];
        const bool takes_part = std::find(stream.begin(), stream.end(), kernel) != stream.end();
        return !takes_part || (heads[other] < stream.size() && stream[heads[other]] == kernel);
      };
      bool all = true;
      for (std::size_t other = 0; other < streams.size(); ++other) all = all && at_head(other);
      if (!all) continue;
      for (std::size_t other = 0; other < streams.size(); ++other) {
        if (heads[other] < streams[other].size() && streams[other][heads[other]] == kernel) {
          ++heads[other];
        }
      }
      moved = true;
    }
    if (over) return true;
    if (!moved) return false;
  }
}

const std::vector<std::vector<std::vector<int>>> kGroups = {
    {{0, 1}, {0, 1}},
    {{0, 1, 2}, {0, 1}, {1, 2}, {0, 2}},  // a triangle: no rank knows all orders
    {{0, 1, 2, 3}, {0, 1}, {2, 3}, {0, 2}, {1, 3}},
    {{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 0}},
    {{0}, {0, 1, 2, 3, 4}, {4}},
};

}  // namespace

TEST(overlapping_groups_launch_in_orders_that_no_gpu_can_deadlock_on) {
  for (const auto& groups : kGroups) {
    for (unsigned seed = 0; seed < 100; ++seed) {
      Job job(5, groups, seed);
      CHECK(job.run(20));
      CHECK(runs(job.launched()));
    }
  }
}

TEST(the_check_above_knows_a_deadlock) {
  CHECK(!runs({{1, 2}, {2, 1}}));
  CHECK(!runs({{1, 2}, {2, 3}, {3, 1}}));
  CHECK(runs({{1, 2}, {1, 3}, {2, 3}}));
}

TEST(a_call_waits_for_one_that_may_become_earlier_and_for_no_other) {
  LaunchOrder order;
  CHECK_EQUAL(order.propose(7), 1);
  CHECK_EQUAL(order.propose(8), 2);
  order.agree(8, 5);
  CHECK(!order.is_next(8));  // the call of 7 may stay at 1
  order.agree(7, 9);
  CHECK(order.is_next(8));
  CHECK(!order.is_next(7));
  CHECK_EQUAL(order.propose(9), 10);  // later than all that is known
  order.leave(8);
  CHECK(order.is_next(7));
}

TEST(equal_ticks_go_by_group) {
  LaunchOrder order;
  order.propose(4);
  order.propose(3);
  order.agree(4, 6);
  order.agree(3, 6);
  CHECK(order.is_next(3));
  CHECK(!order.is_next(4));
}

TEST(a_call_that_was_given_up_holds_nobody) {
  LaunchOrder order;
  order.propose(1);
  order.propose(2);
  order.agree(2, 2);
  CHECK(!order.is_next(2));
  order.leave(1);
  CHECK(order.is_next(2));
  CHECK(!order.is_next(1));
}
