// World::make_group: groups of ranks that find each other through a callback and not through the
// group of all ranks, whose other members know nothing of it.

#include <barrier>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "group/group.h"
#include "group/world.h"
#include "ranks.h"

namespace {

using pycomm::Group;
using pycomm::Operation;
using pycomm::Process;
using pycomm::World;

const std::vector<std::vector<int>> kPlacements = {
    {0, 0, 0, 0}, {0, 0, 1, 1}, {0, 1, 0, 1}, {0, 0, 0, 1}, {0, 1, 2, 3}};
const std::vector<std::vector<int>> kSubsets = {{0, 1, 2, 3}, {0, 2}, {3, 1}, {2}, {3, 0, 2}};

/// Where threads bring a string each and get everybody's.
class Meeting {
 public:
  explicit Meeting(std::size_t members)
      : brought_(members), everybody_(static_cast<std::ptrdiff_t>(members)) {}

  /// What the member at `index` passes to make_group.
  Process::AllGatherBytes of(std::size_t index) {
    return [this, index](const std::string& mine) {
      brought_[index] = mine;
      everybody_.arrive_and_wait();
      auto all = brought_;
      everybody_.arrive_and_wait();
      return all;
    };
  }

 private:
  std::vector<std::string> brought_;
  std::barrier<> everybody_;
};

std::ptrdiff_t index_of(const std::vector<int>& ranks, int rank) {
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] == rank) return static_cast<std::ptrdiff_t>(i);
  }
  return -1;
}

int rank_of(World& world) { return world.group()->rank(); }

void run_worlds(const std::vector<int>& hosts, const std::function<void(World&)>& body) {
  const auto errors = run_worlds_catching(hosts, body, {60, std::size_t{64} << 20});
  for (const auto& error : errors) CHECK_EQUAL(error, std::string());
}

std::int64_t sum(Group& group, std::int64_t mine, double timeout_s = 0) {
  Operation operation;
  operation.kind = pycomm::Kind::kAllReduce;
  operation.dtype = pycomm::DType::kInt64;
  operation.count = 1;
  operation.input = reinterpret_cast<const std::byte*>(&mine);
  operation.output = reinterpret_cast<std::byte*>(&mine);
  operation.timeout_s = timeout_s;
  group.run(std::move(operation), [] {});
  return mine;
}

/// For what must be refused before anybody is asked.
std::vector<std::string> nobody(const std::string&) {
  check::fail(__FILE__, __LINE__, "the other ranks were asked");
}

}  // namespace

TEST(members_alone_make_a_group_in_their_own_order) {
  for (const auto& hosts : kPlacements) {
    for (const auto& members : kSubsets) {
      Meeting meeting(members.size());
      run_worlds(hosts, [&](World& world) {
        const auto index = index_of(members, rank_of(world));
        if (index < 0) return;  // goes straight to close(), where it waits for the members
        const auto group = world.make_group(members, meeting.of(static_cast<std::size_t>(index)));
        CHECK_EQUAL(group->rank(), static_cast<int>(index));
        CHECK_EQUAL(group->size(), static_cast<int>(members.size()));
        std::int64_t expected = 0;
        for (const int member : members) expected += std::int64_t{1} << member;
        for (int repeat = 0; repeat < 20; ++repeat) {
          CHECK_EQUAL(sum(*group, std::int64_t{1} << rank_of(world)), expected);
        }
      });
    }
  }
}

TEST(groups_of_a_rank_made_one_after_the_other_do_not_mix_their_messages) {
  // 0-1-2 and then 1-2-3: who is in both, and who is in one only, must agree on channel tags.
  const std::vector<std::vector<int>> groups = {{0, 1, 2}, {1, 2, 3}, {2, 0}, {0, 1, 2, 3}, {3, 1}};
  for (const auto& hosts : kPlacements) {
    std::map<std::size_t, Meeting> meetings;
    for (std::size_t i = 0; i < groups.size(); ++i) meetings.try_emplace(i, groups[i].size());
    run_worlds(hosts, [&](World& world) {
      std::vector<std::pair<std::size_t, std::shared_ptr<Group>>> mine;
      for (std::size_t i = 0; i < groups.size(); ++i) {
        const auto index = index_of(groups[i], rank_of(world));
        if (index < 0) continue;
        mine.emplace_back(
            i, world.make_group(groups[i], meetings.at(i).of(static_cast<std::size_t>(index))));
      }
      for (int repeat = 0; repeat < 10; ++repeat) {
        for (const auto& [i, group] : mine) {
          const auto base = static_cast<std::int64_t>(100 * i);
          std::int64_t expected = 0;
          for (const int member : groups[i]) expected += base + member;
          CHECK_EQUAL(sum(*group, base + rank_of(world)), expected);
        }
        CHECK_EQUAL(sum(*world.group(), 1), std::int64_t{4});
      }
    });
  }
}

TEST(a_group_has_the_timeout_that_it_was_given) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    Meeting first(2);
    Meeting second(2);
    run_worlds(hosts, [&](World& world) {
      const auto at = static_cast<std::size_t>(rank_of(world));
      const auto impatient = world.make_group({0, 1}, first.of(at), 0.2);
      const auto patient = world.make_group({0, 1}, second.of(at));
      CHECK_EQUAL(sum(*impatient, 1), std::int64_t{2});
      if (at == 0) CHECK_THROWS(sum(*impatient, 1), pycomm::CommTimeoutError, "0.2 s");
      // Rank 1 comes here at once and waits, without a complaint, until rank 0 has given up.
      CHECK_EQUAL(sum(*patient, 1), std::int64_t{2});
      if (at == 1) {
        // The first may still end well: rank 0 had sent its part before it gave up.
        CHECK_THROWS((sum(*impatient, 1), sum(*impatient, 1)), pycomm::CommError, "");
      }
      CHECK_EQUAL(sum(*patient, 1), std::int64_t{2});
    });
  }
}

TEST(ranks_that_make_no_sense_are_refused_before_anybody_is_asked) {
  run_worlds({0, 0, 0}, [](World& world) {
    const std::string on = "make_group on rank " + std::to_string(rank_of(world)) + ": ";
    const int other = (rank_of(world) + 1) % 3;
    const auto refused = [&](const std::vector<int>& ranks, const std::string& problem) {
      CHECK_THROWS(world.make_group(ranks, nobody), pycomm::InvalidArgumentError,
                   (on + problem).c_str());
    };
    refused({0, 1, 2, 1}, "rank 1 is there twice.");
    refused({0, 1, 2, 3}, "rank 3 is not one of the world's.");
    refused({-1, 0, 1, 2}, "rank -1 is not one of the world's.");
    refused({other}, "this rank is not one of them.");
    refused({}, "this rank is not one of them.");
    CHECK_EQUAL(sum(*world.group(), 1), std::int64_t{3});
  });
}

TEST(a_callback_that_answers_wrongly_or_throws_is_an_error) {
  run_worlds({0, 0}, [](World& world) {
    const std::vector<int> both{0, 1};
    const auto one = [](const std::string& mine) { return std::vector<std::string>{mine}; };
    CHECK_THROWS(world.make_group(both, one), pycomm::CommError, "1 group records came of 2");
    const auto short_ones = [](const std::string&) { return std::vector<std::string>{"a", "b"}; };
    CHECK_THROWS(world.make_group(both, short_ones), pycomm::CommError, "malformed group record");
    // Of a rank whose page would lie behind its memory, or whose tag is none of the channel's.
    for (const pycomm::GroupRecord& wild :
         {pycomm::GroupRecord{std::uint64_t{1} << 40, 0},
          pycomm::GroupRecord{~std::uint64_t{4095}, 0}, pycomm::GroupRecord{100, 0},
          pycomm::GroupRecord{0, -1}, pycomm::GroupRecord{0, std::int64_t{1} << 31}}) {
      const std::string theirs(reinterpret_cast<const char*>(&wild), sizeof(wild));
      const auto liar = [&](const std::string& mine) {
        return rank_of(world) == 0 ? std::vector<std::string>{mine, theirs}
                                   : std::vector<std::string>{theirs, mine};
      };
      CHECK_THROWS(world.make_group(both, liar), pycomm::CommError, "malformed group record");
    }
    const auto late = [](const std::string&) -> std::vector<std::string> {
      throw pycomm::CommTimeoutError("nobody came");
    };
    CHECK_THROWS(world.make_group(both, late), pycomm::CommTimeoutError, "nobody came");
    CHECK_EQUAL(sum(*world.group(), 1), std::int64_t{2});
  });
}

TEST(after_a_failed_attempt_the_next_group_works) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    Meeting meeting(2);
    run_worlds(hosts, [&](World& world) {
      const auto at = static_cast<std::size_t>(rank_of(world));
      if (at == 0) {  // it alone had tried before
        const auto late = [](const std::string&) -> std::vector<std::string> {
          throw pycomm::CommTimeoutError("nobody came");
        };
        CHECK_THROWS(world.make_group({0, 1}, late), pycomm::CommTimeoutError, "nobody came");
      }
      const auto group = world.make_group({0, 1}, meeting.of(at));
      CHECK_EQUAL(sum(*group, 1), std::int64_t{2});
    });
  }
}

TEST(a_world_that_was_left_makes_no_groups) {
  auto worlds = World::loopback({0}, {60, std::size_t{64} << 20});
  worlds[0]->close([] {});
  CHECK_THROWS(worlds[0]->make_group({0}, nobody), pycomm::CommError, "was shut down");
}
