// What hosts tell each other beside the data: who is there, who is gone, what is over, and which
// calls can never end. The last is looked for inside one host, too.

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cuttable_channel.h"
#include "forwarding_channel.h"
#include "group/control_message.h"
#include "group/group.h"
#include "group/process.h"
#include "ranks.h"

namespace {

using pycomm::Group;
using pycomm::GroupRecord;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::Process;
using pycomm::World;
namespace control = pycomm::control;

/// Long after whatever a test waits for; who gets there has been told nothing.
constexpr double kDeadlineS = 60;
const auto kNoInterrupt = [] {};
const auto kWhile = std::chrono::milliseconds(2500);  // longer than it takes to find a fault

Process::Options options(double host_timeout_s = 10) {
  Process::Options all{kDeadlineS, std::size_t{64} << 20};
  all.host_timeout_s = host_timeout_s;
  return all;
}

Operation sum_of(std::vector<std::int64_t>& values) {
  Operation operation;
  operation.kind = Kind::kAllReduce;
  operation.dtype = pycomm::DType::kInt64;
  operation.count = values.size();
  operation.input = operation.output = reinterpret_cast<std::byte*>(values.data());
  return operation;
}

std::int64_t sum(Group& group, std::int64_t mine) {
  std::vector<std::int64_t> values{mine};
  group.run(sum_of(values), kNoInterrupt);
  return values[0];
}

void broadcast(Group& group, int root) {
  std::vector<std::int64_t> values{1};
  Operation operation = sum_of(values);
  operation.kind = Kind::kBroadcast;
  operation.root = root;
  group.run(operation, kNoInterrupt);
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

template <typename Exception>
std::string thrown(const std::function<void()>& body) {
  try {
    body();
  } catch (const Exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// As run_worlds_catching, where nothing may be thrown.
void run_worlds(const std::vector<int>& hosts, const std::function<void(World&)>& body,
                const Process::Options& with = options(),
                std::vector<std::shared_ptr<pycomm::Channel>> channels = {}) {
  const auto errors = run_worlds_catching(hosts, body, with, std::move(channels));
  for (const auto& error : errors) CHECK_EQUAL(error, std::string());
}

/// The same for ranks that end without leaving together, since their groups have failed.
void run_failing(const std::vector<int>& hosts, const std::function<void(World&)>& body,
                 const Process::Options& with = options(),
                 std::vector<std::shared_ptr<pycomm::Channel>> channels = {}) {
  std::barrier all_done(static_cast<std::ptrdiff_t>(hosts.size()));
  const auto errors = run_worlds_catching(
      hosts,
      [&](World& world) {
        std::string failure;
        try {
          body(world);
        } catch (const std::exception& error) {
          failure = error.what();
        }
        all_done.arrive_and_wait();  // who leaves the job early is another story
        if (!failure.empty()) throw check::Failure(failure);
        world.group()->abort("the test is over");
      },
      with, std::move(channels));
  for (const auto& error : errors) CHECK_EQUAL(error, std::string());
}

int rank_of(World& world) { return world.group()->rank(); }

/// A channel whose progress thread is stopped at its first call of it, until it may go on.
class StoppedChannel final : public ForwardingChannel {
 public:
  using ForwardingChannel::ForwardingChannel;

  void go_on() { stopped_.store(false); }

  void progress() override {
    while (stopped_.load()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    ForwardingChannel::progress();
  }

 private:
  std::atomic<bool> stopped_{true};
};

/// A channel on which messages of a rank that dies come halfway: MPI says that it is gone, and goes
/// on to write to their memory after they were withdrawn.
class DyingPeerChannel final : public ForwardingChannel {
 public:
  DyingPeerChannel(std::shared_ptr<pycomm::Channel> channel, int dying)
      : ForwardingChannel(std::move(channel)), dying_(dying) {}

  void die() { dead_.store(true); }
  /// Messages that were withdrawn.
  std::size_t withdrawn() const { return withdrawn_.load(); }

  std::optional<Incoming> probe(int tag) override {
    for (const auto& room : late_) std::fill(room.begin(), room.end(), std::byte{0xa5});
    return ForwardingChannel::probe(tag);
  }
  std::unique_ptr<pycomm::Message> receive(int peer, int tag, std::span<std::byte> bytes) override {
    auto message = ForwardingChannel::receive(peer, tag, bytes);
    if (peer != dying_ || tag != kControlTag || !dead_.load()) return message;
    return std::make_unique<Half>(*this, std::move(message), bytes);
  }

 private:
  class Half final : public pycomm::Message {
   public:
    Half(DyingPeerChannel& channel, std::unique_ptr<pycomm::Message> whole,
         std::span<std::byte> room)
        : channel_(channel), whole_(std::move(whole)), room_(room) {}
    ~Half() override {
      channel_.late_.push_back(room_);
      ++channel_.withdrawn_;
    }
    bool poll() override {
      whole_->poll();  // it is taken
      if (++polls_ > 3) throw pycomm::PeerLostError("MPI says that rank 2 is gone");
      return false;
    }
    std::string describe() const override { return "half of a message"; }

   private:
    DyingPeerChannel& channel_;
    const std::unique_ptr<pycomm::Message> whole_;
    const std::span<std::byte> room_;
    int polls_ = 0;
  };

  const int dying_;
  std::atomic<bool> dead_{false};
  std::atomic<std::size_t> withdrawn_{0};
  std::vector<std::span<std::byte>> late_;
};

}  // namespace

// --- calls that can never end --------------------------------------------------------------------

TEST(two_groups_called_in_opposite_order_are_an_error_on_both_ranks) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    run_failing(hosts, [](World& world) {
      const auto a = world.group()->duplicate(kNoInterrupt);
      const auto b = world.group()->duplicate(kNoInterrupt);
      const bool first = rank_of(world) == 0;
      const auto text = thrown<pycomm::MismatchError>([&] {
        sum(first ? *a : *b, 1);
        sum(first ? *b : *a, 1);
      });
      CHECK(contains(text,
                     "rank 0 in all_reduce of 1 int64, SUM (call #1 of the group of ranks 0, "
                     "1) for rank 1"));
      CHECK(contains(text, "same order"));
    });
  }
}

TEST(a_circle_of_three_groups_is_an_error_on_all_ranks_and_on_who_waits_beside) {
  for (const std::vector<int>& hosts : {std::vector{0, 0, 0, 0}, std::vector{0, 1, 2, 2}}) {
    run_failing(hosts, [](World& world) {
      const int me = rank_of(world);
      std::vector<std::shared_ptr<Group>> groups;  // rank 3 is in the first
      for (const std::vector<int>& ranks :
           {std::vector{0, 1, 3}, std::vector{1, 2}, std::vector{0, 2}}) {
        groups.push_back(world.group()->new_group(ranks, kNoInterrupt));
      }
      const int begin = me == 3 ? 0 : me;
      const auto text = thrown<pycomm::MismatchError>([&] {
        for (int i = 0; i < 3; ++i) {
          const auto& group = groups[static_cast<std::size_t>((begin + i) % 3)];
          if (group != nullptr) sum(*group, 1);
        }
      });
      CHECK(contains(text, "in a circle"));
      CHECK(contains(text, "of the group of ranks 0, 1, 3) for rank 1"));
      CHECK(contains(text, "of the group of ranks 0, 2) for rank 0"));
    });
  }
}

TEST(asynchronous_calls_that_are_waited_for_in_a_circle_are_found) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    run_failing(hosts, [](World& world) {
      const auto a = world.group()->duplicate(kNoInterrupt);
      const auto b = world.group()->duplicate(kNoInterrupt);
      std::vector<std::int64_t> mine{1};
      const auto text = thrown<pycomm::MismatchError>([&] {
        const auto work = (rank_of(world) == 0 ? a : b)->start(sum_of(mine));
        work->wait(kNoInterrupt);
      });
      CHECK(contains(text, "in a circle"));
    });
  }
}

TEST(different_calls_are_told_although_a_rank_has_not_come) {
  // Before that only the ranks that meet in a step could compare.
  for (const std::vector<int>& hosts : {std::vector{0, 0, 0}, std::vector{0, 1, 1}}) {
    std::atomic<int> told{0};
    run_failing(hosts, [&](World& world) {
      const int me = rank_of(world);
      if (me == 1) {  // the missing rank: it computes until the others know
        while (told.load() < 2) std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      const auto text = thrown<pycomm::MismatchError>([&] { broadcast(*world.group(), me); });
      ++told;
      CHECK(contains(text, "root 0"));
      CHECK(contains(text, me == 1 ? "root" : "root 2"));
    });
  }
}

TEST(two_ranks_that_both_send_as_roots) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    run_failing(hosts, [](World& world) {
      const auto text =
          thrown<pycomm::MismatchError>([&] { broadcast(*world.group(), rank_of(world)); });
      CHECK(contains(text, "broadcast of 1 int64, root 0"));
      CHECK(contains(text, "broadcast of 1 int64, root 1"));
    });
  }
}

TEST(waiting_for_a_rank_that_shuts_down_instead_is_told_on_other_hosts) {
  std::vector<std::shared_ptr<Group>> groups(2);  // outlive the call of shutdown
  const auto errors = run_worlds_catching(
      {0, 1},
      [&](World& world) {
        auto& other = groups[static_cast<std::size_t>(rank_of(world))];
        other = world.group()->duplicate(kNoInterrupt);
        if (rank_of(world) == 0) sum(*other, 1);
      },
      options());
  for (const auto& error : errors) CHECK(contains(error, "in shutdown (call #2"));
}

TEST(patterns_that_only_look_like_a_circle_raise_nothing) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    run_worlds(hosts, [](World& world) {
      const bool first = rank_of(world) == 0;
      const auto a = world.group()->duplicate(kNoInterrupt);
      const auto b = world.group()->duplicate(kNoInterrupt);
      std::vector<std::int64_t> of_a{1};
      std::vector<std::int64_t> of_b{1};
      // Started in one order, waited for in the other, by a rank that takes its time.
      const auto work_a = a->start(sum_of(of_a));
      if (!first) std::this_thread::sleep_for(kWhile);
      const auto work_b = b->start(sum_of(of_b));
      (first ? work_a : work_b)->wait(kNoInterrupt);
      (first ? work_b : work_a)->wait(kNoInterrupt);
      CHECK_EQUAL(of_a[0] + of_b[0], std::int64_t{4});
      // A thread for each group, and the ranks late in different ones.
      std::thread side([&] {
        if (first) std::this_thread::sleep_for(kWhile);
        CHECK_EQUAL(sum(*a, 1), std::int64_t{2});
        CHECK_EQUAL(sum(*a, 1), std::int64_t{2});
      });
      if (!first) std::this_thread::sleep_for(kWhile);
      CHECK_EQUAL(sum(*b, 1), std::int64_t{2});
      CHECK_EQUAL(sum(*b, 1), std::int64_t{2});
      side.join();
    });
  }
}

TEST(a_rank_that_computes_between_calls_of_two_groups_raises_nothing) {
  run_worlds({0, 1, 1}, [](World& world) {
    const auto pair = world.group()->new_group({0, 1}, kNoInterrupt);
    // Rank 1 waits in the pair for rank 0, rank 2 in the world for both.
    if (rank_of(world) == 0) std::this_thread::sleep_for(kWhile);
    if (pair != nullptr) CHECK_EQUAL(sum(*pair, 1), std::int64_t{2});
    CHECK_EQUAL(sum(*world.group(), 1), std::int64_t{3});
  });
}

// --- what is over --------------------------------------------------------------------------------

TEST(that_a_group_was_given_up_is_heard_on_other_hosts) {
  for (const std::vector<int>& hosts : {std::vector{0, 1}, std::vector{0, 1, 1, 2}}) {
    run_failing(hosts, [](World& world) {
      const auto group = world.group()->duplicate(kNoInterrupt);
      if (rank_of(world) == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        group->abort("rank 0 has had enough");
        return;
      }
      const auto text = thrown<pycomm::PeerLostError>([&] { sum(*group, 1); });
      CHECK_EQUAL(text, std::string("rank 0 has had enough"));
    });
  }
}

TEST(a_timeout_on_one_host_is_everybodys_error) {
  run_failing({0, 1, 1}, [](World& world) {
    const auto group = world.group()->duplicate(kNoInterrupt);
    if (rank_of(world) == 2) return;
    std::vector<std::int64_t> values{1};
    Operation operation = sum_of(values);
    operation.timeout_s = rank_of(world) == 0 ? 0.5 : kDeadlineS;
    const auto text =
        thrown<pycomm::CommTimeoutError>([&] { group->run(operation, kNoInterrupt); });
    CHECK(contains(text, "on rank 0: timeout after 0.5 s"));
  });
}

TEST(the_end_of_the_job_is_heard_on_other_hosts) {
  run_failing({0, 1}, [](World& world) {
    if (rank_of(world) == 0) {
      world.abort("the job was ended by rank 0: bad batch");
      return;
    }
    const auto text = thrown<pycomm::PeerLostError>([&] { sum(*world.group(), 1); });
    CHECK_EQUAL(text, std::string("the job was ended by rank 0: bad batch"));
  });
}

TEST(a_group_hears_that_it_is_over_although_it_is_still_being_made) {
  std::vector<std::string> brought(2);
  std::barrier both(2);
  std::atomic<bool> given_up{false};
  run_failing({0, 1}, [&](World& world) {
    const auto me = static_cast<std::size_t>(rank_of(world));
    const auto group = world.make_group({0, 1}, [&](const std::string& mine) {
      brought[me] = mine;
      both.arrive_and_wait();
      while (me == 1 && !given_up.load()) std::this_thread::yield();
      if (me == 1) std::this_thread::sleep_for(std::chrono::milliseconds(1500));
      return brought;
    });
    if (me == 0) {
      group->abort("over before it began");
      given_up.store(true);
      return;
    }
    const auto text = thrown<pycomm::PeerLostError>([&] { sum(*group, 1); });
    CHECK_EQUAL(text, std::string("over before it began"));
  });
}

// --- who is there --------------------------------------------------------------------------------

TEST(a_host_behind_a_cut_cable_is_lost_to_all_others_and_they_to_it) {
  for (const std::vector<int>& hosts : {std::vector{0, 0, 1, 1}, std::vector{0, 1, 2, 2}}) {
    const auto cables = std::make_shared<CuttableChannel::Cables>(hosts);
    const int lost = hosts.back();
    run_failing(
        hosts,
        [&](World& world) {
          Group& group = *world.group();
          const int me = rank_of(world);
          CHECK_EQUAL(sum(group, 1), static_cast<std::int64_t>(group.size()));
          std::this_thread::sleep_for(std::chrono::milliseconds(300));  // everybody was heard
          if (me == 0) cables->cut(lost);
          if (me == 1) std::this_thread::sleep_for(std::chrono::milliseconds(1500));  // computes
          const auto text = thrown<pycomm::PeerLostError>([&] {
            for (;;) sum(group, 1);
          });
          const bool on_lost_host = hosts[static_cast<std::size_t>(me)] == lost;
          CHECK(contains(text, "all_reduce of 1 int64, SUM (call #"));
          CHECK(contains(text, on_lost_host ? "no answer from host '"
                                            : "no answer from host '" + std::to_string(lost) +
                                                  "' (ranks 2, 3) to host '"));
          CHECK(contains(text, "it is down, frozen, or the network between is cut"));
          CHECK(contains(text, "PYCOMM_HOST_TIMEOUT_S"));
        },
        options(1), cuttable_channels(cables));
  }
}

TEST(groups_without_a_rank_of_the_lost_host_go_on) {
  const std::vector<int> hosts{0, 1, 2};
  const auto cables = std::make_shared<CuttableChannel::Cables>(hosts);
  std::barrier lost_two(2);
  run_failing(
      hosts,
      [&](World& world) {
        const auto pair = world.group()->new_group({0, 1}, kNoInterrupt);
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        if (pair == nullptr) return cables->cut(2);
        thrown<pycomm::PeerLostError>([&] { sum(*world.group(), 1); });
        CHECK(world.group()->failed());
        lost_two.arrive_and_wait();
        for (int repeat = 0; repeat < 10; ++repeat) CHECK_EQUAL(sum(*pair, 1), std::int64_t{2});
      },
      options(1), cuttable_channels(cables));
}

// Beats go to the rank that speaks for a host. The next one had never heard of any other, so it
// gave them the minute that a host has to begin.
TEST(who_speaks_next_for_a_host_gives_the_others_no_second_start) {
  const std::vector<int> hosts{0, 0, 1};
  const auto cables = std::make_shared<CuttableChannel::Cables>(hosts);
  run_failing(
      hosts,
      [&](World& world) {
        const auto pair = world.group()->new_group({1, 2}, kNoInterrupt);
        std::this_thread::sleep_for(std::chrono::milliseconds(800));  // the speakers were heard
        if (pair == nullptr) {
          cables->cut(1);
          world.group()->abort("rank 0 goes");
          return world.close(kNoInterrupt);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        const auto text = thrown<pycomm::PeerLostError>([&] { sum(*pair, 1); });
        CHECK(contains(text, "no answer from host '"));
      },
      options(1), cuttable_channels(cables));
}

/// Channels of so many ranks, of which those of `stopped` are, from before their first beat.
struct Stopped {
  Stopped(int size, const std::vector<int>& stopped) : of_rank(static_cast<std::size_t>(size)) {
    for (auto& channel : pycomm::make_loopback_channels(size)) {
      channels.push_back(std::move(channel));
    }
    for (const int rank : stopped) {
      const auto at = static_cast<std::size_t>(rank);
      of_rank[at] = std::make_shared<StoppedChannel>(channels[at]);
      channels[at] = of_rank[at];
    }
  }

  std::vector<std::shared_ptr<pycomm::Channel>> channels;
  std::vector<std::shared_ptr<StoppedChannel>> of_rank;  // null: it runs
};

/// The ranks of `stopped` are; the two others on two hosts hear of each other once, and are to make
/// a call long after.
void check_pair_beside_stopped(const std::vector<int>& hosts, const std::vector<int>& stopped,
                               const std::vector<int>& pair) {
  const Stopped ranks(static_cast<int>(hosts.size()), stopped);
  std::vector<std::string> brought(2);
  std::barrier both(2);
  std::atomic<int> done{0};
  run_failing(
      hosts,
      [&](World& world) {
        if (const auto& channel = ranks.of_rank[static_cast<std::size_t>(rank_of(world))]) {
          while (done.load() < 2) std::this_thread::sleep_for(std::chrono::milliseconds(10));
          return channel->go_on();
        }
        const std::size_t me = rank_of(world) == pair[0] ? 0 : 1;
        std::vector<std::shared_ptr<Group>> groups;
        for (int i = 0; i < 2; ++i) {
          groups.push_back(world.make_group(pair, [&](const std::string& mine) {
            both.arrive_and_wait();
            brought[me] = mine;
            both.arrive_and_wait();
            return brought;
          }));
        }
        // Its host has been heard of: it has no time to begin any more.
        if (me == 0) groups[0]->abort("enough");
        if (me == 1) thrown<pycomm::PeerLostError>([&] { sum(*groups[0], 1); });
        std::this_thread::sleep_for(kWhile);  // longer than a host may be silent
        if (me == 0)
          std::this_thread::sleep_for(std::chrono::milliseconds(300));  // the other waits
        const auto text = thrown<pycomm::CommError>([&] { sum(*groups[1], 1); });
        ++done;
        CHECK_EQUAL(text, std::string("nothing was thrown"));
      },
      options(1), ranks.channels);
}

// It counted as one that begins, and so as the one that speaks for its host, for ever.
TEST(a_rank_that_is_stopped_before_its_first_beat_does_not_silence_its_host) {
  check_pair_beside_stopped({0, 0, 1}, {0}, {1, 2});
}

// Each of those who speak next told the other host's first rank alone.
TEST(two_hosts_whose_first_ranks_are_stopped_find_each_other) {
  check_pair_beside_stopped({0, 0, 1, 1}, {0, 2}, {1, 3});
}

// Beats name who is stopped, and went only to the rank that speaks for a host: the next one, which
// gave up first, could not know whom the rank that it waited for waited for itself.
TEST(any_rank_that_gives_up_names_one_that_is_stopped_on_another_host) {
  const Stopped ranks(4, {3});
  std::atomic<int> told{0};
  run_failing(
      {0, 0, 1, 1},
      [&](World& world) {
        const int me = rank_of(world);
        if (me == 3) {
          while (told.load() < 3) std::this_thread::sleep_for(std::chrono::milliseconds(10));
          return ranks.of_rank[3]->go_on();
        }
        std::vector<std::byte> bytes(4);
        pycomm::Transfer message;
        message.direction = pycomm::Transfer::Direction::kReceive;
        message.memory = bytes.data();
        message.count = bytes.size();
        message.peer = me + 1;
        const double timeout_s = me == 1 ? 3 : kDeadlineS;
        const auto text = thrown<pycomm::CommTimeoutError>(
            [&] { world.group()->post_office().run(message, timeout_s, kNoInterrupt); });
        ++told;
        CHECK(contains(text, "from rank 2, tag 0, on rank 1: timeout"));
        CHECK(contains(text, "The process of rank 3 does not run, while its host does"));
      },
      options(2), ranks.channels);
}

TEST(a_host_that_is_only_slow_is_not_lost) {
  run_worlds(
      {0, 0, 1},
      [](World& world) {
        Group& group = *world.group();
        if (rank_of(world) == 2) std::this_thread::sleep_for(std::chrono::milliseconds(3500));
        CHECK_EQUAL(sum(group, 1), std::int64_t{3});
      },
      options(1));
}

TEST(a_host_that_has_left_is_not_missed) {
  run_failing(
      {0, 1, 2},
      [](World& world) {
        const auto pair = world.group()->new_group({1, 2}, kNoInterrupt);
        CHECK_EQUAL(sum(*world.group(), 1), std::int64_t{3});
        std::this_thread::sleep_for(std::chrono::milliseconds(400));  // everybody was heard
        if (pair == nullptr) {
          world.group()->abort("rank 0 goes");
          return world.close(kNoInterrupt);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(2500));
        const auto text = thrown<pycomm::PeerLostError>([&] { sum(*world.group(), 1); });
        CHECK_EQUAL(text, std::string("rank 0 goes"));
        CHECK_EQUAL(sum(*pair, 1), std::int64_t{2});
      },
      options(0.8));
}

TEST(word_of_a_dead_process_reaches_the_other_hosts) {
  // A thread that ends while it holds the word stands for the process: the kernel marks it.
  const std::vector<int> hosts{0, 1, 1, 2};
  const auto processes = Process::loopback(hosts, options());
  std::vector<std::shared_ptr<Group>> groups;
  for (const auto& process : processes) {
    groups.push_back(Group::create(process, {0, 1, 2, 3}, [](const GroupRecord& mine) {
      return std::vector<GroupRecord>(4, mine);
    }));
  }
  std::vector<std::string> texts(4);
  std::vector<std::thread> threads;
  for (const std::size_t rank : {0u, 1u, 3u}) {
    threads.emplace_back(
        [&, rank] { texts[rank] = thrown<pycomm::PeerLostError>([&] { sum(*groups[rank], 1); }); });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  std::thread([&] {
    // Never destroyed, as in a process that is killed; known, so that it is no leak.
    static auto& kept = *new std::vector<pycomm::LifeKeeper*>();
    kept.push_back(new pycomm::LifeKeeper(processes[2]->page().life));
  }).join();
  for (auto& thread : threads) thread.join();
  for (const std::size_t rank : {0u, 1u, 3u}) {
    CHECK(contains(texts[rank], "rank 2"));
    CHECK(contains(texts[rank], "is gone, its process ended without leaving the job"));
  }
  for (auto& process : processes) process->stop();
}

// A message that came halfway used to be polled, and to raise, with every look: those behind it
// were never read, so that their hosts seemed silent, and those before it were handled again or
// crashed.
TEST(half_a_message_of_a_dead_rank_keeps_no_other_from_being_heard) {
  std::vector<std::shared_ptr<pycomm::Channel>> channels;
  for (auto& channel : pycomm::make_loopback_channels(3)) channels.push_back(std::move(channel));
  const auto dying = std::make_shared<DyingPeerChannel>(channels[0], 2);
  channels[0] = dying;
  std::barrier lost(2);
  run_failing(
      {0, 1, 2},
      [&](World& world) {
        const auto pair = world.group()->new_group({0, 1}, kNoInterrupt);
        std::this_thread::sleep_for(std::chrono::milliseconds(300));  // everybody was heard
        if (pair == nullptr) return dying->die();
        const auto text = thrown<pycomm::PeerLostError>([&] { sum(*world.group(), 1); });
        CHECK(contains(text, "MPI says that rank 2 is gone"));
        lost.arrive_and_wait();
        std::this_thread::sleep_for(kWhile);  // longer than a host may be silent
        for (int repeat = 0; repeat < 10; ++repeat) CHECK_EQUAL(sum(*pair, 1), std::int64_t{2});
      },
      options(1), channels);
  CHECK(dying->withdrawn() > 0);
}

// --- messages ------------------------------------------------------------------------------------

TEST(control_messages_survive_the_wire) {
  control::Loss loss;
  loss.rank_count = 2;
  loss.ranks[0] = 3;
  loss.ranks[1] = 1;
  control::set_text(loss.text, std::string(5000, 'x'));
  const auto bytes = control::encode(loss);
  const auto back = std::get<control::Loss>(control::decode(bytes, 0, 4));
  CHECK_EQUAL(back.rank_count, 2);
  CHECK_EQUAL(back.ranks[0], 3);
  CHECK_EQUAL(std::strlen(back.text.data()), control::Loss::kMostText - 1);
  CHECK(std::holds_alternative<control::Beat>(
      control::decode(control::encode(control::Beat()), 0, 4)));
  CHECK(std::holds_alternative<pycomm::Standing>(control::decode(control::encode([] {
                                                                   pycomm::Standing standing;
                                                                   standing.rank = 0;
                                                                   return standing;
                                                                 }()),
                                                                 0, 4)));
}

TEST(nothing_of_a_malformed_message_is_believed) {
  const auto refused = [](std::vector<std::byte> bytes) {
    CHECK_THROWS(control::decode(bytes, 3, 4), pycomm::MismatchError,
                 "rank 3 sent a malformed control message");
  };
  refused({});
  refused(std::vector<std::byte>(7));
  refused(std::vector<std::byte>(200));
  for (const control::Body& body : {control::Body(control::Beat()), control::Body(control::End()),
                                    control::Body(control::Leave())}) {
    auto bytes = control::encode(body);
    bytes.pop_back();
    refused(bytes);
    bytes.resize(bytes.size() + 2);
    refused(bytes);
    bytes = control::encode(body);
    bytes[0] ^= std::byte{1};
    refused(bytes);
    bytes = control::encode(body);
    bytes[4] = std::byte{99};
    refused(bytes);
  }
  control::Beat beat;
  beat.stalled_count = 33;
  refused(control::encode(beat));
  beat.stalled_count = -1;
  refused(control::encode(beat));
  beat.stalled_count = 1;
  beat.stalled[0] = 4;  // of 0 to 3
  refused(control::encode(beat));
  control::Loss loss;
  loss.text.fill('x');  // without an end
  refused(control::encode(loss));
  control::End end;
  end.kind = static_cast<pycomm::NoticeKind>(9);
  refused(control::encode(end));
  pycomm::Standing standing;
  standing.rank = 0;
  standing.call_count = 5;
  refused(control::encode(standing));
  control::Leave leave;
  leave.successor = 4;
  refused(control::encode(leave));
}

TEST(a_malformed_message_ends_the_job_of_who_gets_it) {
  auto channels = pycomm::make_loopback_channels(2);
  const std::vector<std::shared_ptr<pycomm::Channel>> both(channels.begin(), channels.end());
  run_failing(
      {0, 1},
      [&](World& world) {
        CHECK_EQUAL(sum(*world.group(), 1), std::int64_t{2});
        if (rank_of(world) == 0) {
          const std::vector<std::byte> junk(100);
          channels[0]->send(1, pycomm::Channel::kControlTag, junk);
        }
        const auto text = thrown<pycomm::MismatchError>([&] {
          for (;;) sum(*world.group(), 1);
        });
        CHECK(contains(text, "rank 0 sent a malformed control message of 100 bytes"));
      },
      options(), both);
}
