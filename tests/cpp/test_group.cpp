// Collectives through groups of threads: the whole stack below Python, on one pretend host or
// several. Runs under the thread sanitizer as well, which checks the shared-memory protocol.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "group/group.h"
#include "group/turn.h"
#include "ranks.h"
#include "transport/channel_loopback.h"

namespace {

using pycomm::Group;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::Turn;

const std::vector<std::vector<int>> kPlacements = {{0},          {0, 0},       {0, 0, 0},
                                                   {0, 0, 0, 0}, {0, 0, 1, 1}, {0, 0, 0, 1},
                                                   {0, 1, 0, 1}, {0, 1, 2, 3}, {0, 1, 2}};
const auto kNoInterrupt = [] {};

Operation sum_of(std::vector<std::int64_t>& values) {
  Operation operation;
  operation.kind = Kind::kAllReduce;
  operation.dtype = pycomm::DType::kInt64;
  operation.count = values.size();
  operation.input = reinterpret_cast<const std::byte*>(values.data());
  operation.output = reinterpret_cast<std::byte*>(values.data());
  return operation;
}

/// Rank r contributes i * (r + 1) at position i.
std::vector<std::int64_t> contribution(int rank, std::size_t count) {
  std::vector<std::int64_t> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<std::int64_t>(i) * (rank + 1);
  return values;
}

void check_sum(const std::vector<std::int64_t>& values, int size) {
  const std::int64_t ranks = size * (size + 1) / 2;
  for (std::size_t i = 0; i < values.size(); ++i) {
    CHECK_EQUAL(values[i], static_cast<std::int64_t>(i) * ranks);
  }
}

/// The progress thread lets go of a group a moment after the work it waited for is done.
std::unique_ptr<Turn> next_turn(Group& group) {
  for (;;) {
    if (auto turn = Turn::take(group.shared_from_this())) return turn;
    std::this_thread::yield();
  }
}

/// A network that keeps what it has taken until it was called a few times more, as MPI may when the
/// way to a peer is full.
class HoldingChannel : public pycomm::LoopbackChannel {
 public:
  static constexpr int kCalls = 8;
  /// Until everybody has come through: MPI sends all it has when it ends, and this is not MPI.
  static inline std::atomic<bool> holds{true};
  using LoopbackChannel::LoopbackChannel;

  std::unique_ptr<pycomm::Message> send(int peer, int tag,
                                        std::span<const std::byte> bytes) override {
    call();
    held_.push_back({peer, tag, {bytes.begin(), bytes.end()}, 0});
    if (!holds) call();
    return std::make_unique<Called>(*this, nullptr);
  }
  std::unique_ptr<pycomm::Message> receive(int peer, int tag, std::span<std::byte> bytes) override {
    return std::make_unique<Called>(*this, LoopbackChannel::receive(peer, tag, bytes));
  }
  std::unique_ptr<pycomm::Message> receive_at_most(int peer, int tag, std::span<std::byte> room,
                                                   std::size_t& length) override {
    return std::make_unique<Called>(*this,
                                    LoopbackChannel::receive_at_most(peer, tag, room, length));
  }
  std::optional<Incoming> probe(int tag) override {
    call();
    return LoopbackChannel::probe(tag);
  }
  void progress() override { call(); }

 private:
  struct Held {
    int peer;
    int tag;
    std::vector<std::byte> bytes;
    int calls;
  };
  class Called : public pycomm::Message {
   public:
    Called(HoldingChannel& channel, std::unique_ptr<pycomm::Message> message)
        : channel_(channel), message_(std::move(message)) {}
    bool poll() override {
      channel_.call();
      return message_ == nullptr || message_->poll();
    }
    std::string describe() const override {
      return message_ == nullptr ? "a send that is over" : message_->describe();
    }

   private:
    HoldingChannel& channel_;
    std::unique_ptr<pycomm::Message> message_;  // null: a send
  };

  void call() {
    for (Held& held : held_) ++held.calls;
    for (; !held_.empty() && (!holds || held_.front().calls > kCalls); held_.pop_front()) {
      LoopbackChannel::send(held_.front().peer, held_.front().tag, held_.front().bytes);
    }
  }

  std::deque<Held> held_;
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(all_reduce_sums_every_size_on_every_placement) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      // 200000 elements of 8 bytes: several pieces of staging
      for (const std::size_t count : {0, 1, 3, 5, 6, 512, 513, 1000, 200000}) {
        auto values = contribution(group.rank(), count);
        group.run(sum_of(values), kNoInterrupt);
        check_sum(values, group.size());
      }
    });
  }
}

TEST(all_reduce_in_the_arena_needs_no_staging) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      const std::size_t count = 100000;
      const auto block = group.allocate(count * sizeof(std::int64_t));
      auto* values = reinterpret_cast<std::int64_t*>(block->data());
      for (int repeat = 0; repeat < 3; ++repeat) {
        for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<std::int64_t>(i);
        Operation operation;
        operation.kind = Kind::kAllReduce;
        operation.dtype = pycomm::DType::kInt64;
        operation.count = count;
        operation.input = operation.output = block->data();
        group.run(operation, kNoInterrupt);
        for (std::size_t i = 0; i < count; i += 97) {
          CHECK_EQUAL(values[i], static_cast<std::int64_t>(i) * group.size());
        }
      }
    });
  }
}

TEST(ring_and_direct_exchange_agree_on_exact_sums) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      for (const auto algorithm : {pycomm::Algorithm::kRing, pycomm::Algorithm::kDirect}) {
        for (const std::size_t count : {0, 1, 7, 1000, 200000}) {
          auto values = contribution(group.rank(), count);
          auto operation = sum_of(values);
          operation.algorithm = algorithm;
          group.run(operation, kNoInterrupt);
          check_sum(values, group.size());
        }
      }
    });
  }
}

TEST(queued_operations_run_in_order) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      std::vector<std::vector<std::int64_t>> buffers;
      for (std::size_t count = 1; count < 40; ++count) {
        buffers.push_back(contribution(group.rank(), count * 37));
      }
      std::vector<std::shared_ptr<pycomm::Work>> works;
      for (auto& buffer : buffers) works.push_back(group.start(sum_of(buffer)));
      for (const auto& work : works) work->wait(kNoInterrupt);
      for (const auto& buffer : buffers) check_sum(buffer, group.size());
    });
  }
}

TEST(a_turn_runs_its_operations_in_the_callers_thread_and_queued_ones_after_it) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 0, 0}}) {
    run_ranks(hosts, [](Group& group) {
      for (int round = 0; round < 3; ++round) {
        std::vector<std::vector<std::int64_t>> buffers;
        for (std::size_t count = 1; count < 30; ++count) {
          buffers.push_back(contribution(group.rank(), count * 377));
        }
        auto queued = contribution(group.rank(), 5000);
        std::shared_ptr<pycomm::Work> work;
        {
          const auto turn = next_turn(group);
          CHECK(Turn::take(group.shared_from_this()) == nullptr);
          work = group.start(sum_of(queued));
          for (auto& buffer : buffers) turn->start(sum_of(buffer));
          turn->advance();
          turn->wait(kNoInterrupt);
          CHECK(turn->done());
          CHECK(!work->done());
        }
        work->wait(kNoInterrupt);
        for (const auto& buffer : buffers) check_sum(buffer, group.size());
        check_sum(queued, group.size());
        auto last = contribution(group.rank(), 10);
        group.run(sum_of(last), kNoInterrupt);
        check_sum(last, group.size());
      }
    });
  }
}

TEST(a_turn_waits_for_nobody_before_wait) {
  std::atomic<bool> passed{false};
  run_ranks({0, 0}, [&passed](Group& group) {
    auto values = contribution(group.rank(), 1000);
    if (group.rank() == 0) {
      const auto turn = Turn::take(group.shared_from_this());
      turn->start(sum_of(values));  // rank 1 has not come, and comes only once this has returned
      CHECK(!turn->done());
      passed.store(true);
      turn->wait(kNoInterrupt);
    } else {
      while (!passed.load()) std::this_thread::yield();
      group.run(sum_of(values), kNoInterrupt);
    }
    check_sum(values, group.size());
  });
}

TEST(between_hosts_there_is_no_turn) {
  run_ranks({0, 1}, [](Group& group) { CHECK(Turn::take(group.shared_from_this()) == nullptr); });
}

TEST(a_turn_keeps_its_error_for_wait_and_the_group_is_finished) {
  run_ranks_catching({0, 0}, [](Group& group) {
    auto values = contribution(group.rank(), group.rank() == 1 ? 11u : 10u);
    auto more = contribution(group.rank(), 5);
    const auto turn = Turn::take(group.shared_from_this());
    turn->start(sum_of(values));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    turn->advance();
    turn->start(sum_of(more));
    for (int attempt = 0; attempt < 2; ++attempt) {
      std::string text;
      try {
        turn->wait(kNoInterrupt);
      } catch (const pycomm::MismatchError& error) {
        text = error.what();
      }
      CHECK(contains(text, "differs"));
    }
    CHECK(group.failed());
  });
}

TEST(duplicated_groups_used_in_different_orders_do_not_wait_for_each_other) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      const auto first = group.duplicate(kNoInterrupt);
      const auto second = group.duplicate(kNoInterrupt);
      auto a = contribution(group.rank(), 5000);
      auto b = contribution(group.rank(), 3000);
      // Even ranks issue them one way round, odd ranks the other.
      const bool even = group.rank() % 2 == 0;
      const auto one = (even ? first : second)->start(sum_of(even ? a : b));
      const auto other = (even ? second : first)->start(sum_of(even ? b : a));
      other->wait(kNoInterrupt);
      one->wait(kNoInterrupt);
      check_sum(a, group.size());
      check_sum(b, group.size());
    });
  }
}

TEST(broadcast_reaches_every_rank_from_every_root) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      for (int root = 0; root < group.size(); ++root) {
        for (const std::size_t count : {0, 1, 600, 300000}) {
          auto values = contribution(group.rank(), count);
          Operation operation = sum_of(values);
          operation.kind = Kind::kBroadcast;
          operation.root = root;
          group.run(operation, kNoInterrupt);
          CHECK(values == contribution(root, count));
        }
      }
    });
  }
}

TEST(what_the_network_still_holds_reaches_who_waits_for_it) {
  // Rank 1 is done when its last message is with the network, and then waits inside its host: for
  // rank 0, which waits for rank 2, which waits for that message.
  const auto mailboxes = pycomm::make_loopback_mailboxes(3);
  std::vector<std::shared_ptr<pycomm::Channel>> channels;
  for (int rank = 0; rank < 3; ++rank) {
    channels.push_back(std::make_shared<HoldingChannel>(rank, mailboxes));
  }
  const auto errors = run_ranks_catching(
      {0, 0, 1},
      [](Group& group) {
        std::vector<std::int64_t> all(300, 7);
        std::vector<std::int64_t> mine(100);
        Operation scatter;
        scatter.kind = Kind::kScatter;
        scatter.dtype = pycomm::DType::kInt64;
        scatter.root = 1;
        scatter.count = mine.size();
        scatter.input = reinterpret_cast<const std::byte*>(all.data());
        scatter.output = reinterpret_cast<std::byte*>(mine.data());
        group.run(scatter, kNoInterrupt);
        group.run(Operation(), kNoInterrupt);
        HoldingChannel::holds = false;
        CHECK(mine == std::vector<std::int64_t>(100, 7));
      },
      {10, std::size_t{64} << 20}, channels);
  for (const std::string& error : errors) CHECK_EQUAL(error, std::string());
}

TEST(all_gather_lays_the_ranks_end_to_end) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      for (const std::size_t count : {0, 1, 600, 300000}) {
        const auto mine = contribution(group.rank(), count);
        std::vector<std::int64_t> all(count * static_cast<std::size_t>(group.size()));
        Operation operation;
        operation.kind = Kind::kAllGather;
        operation.dtype = pycomm::DType::kInt64;
        operation.count = count;
        operation.input = reinterpret_cast<const std::byte*>(mine.data());
        operation.output = reinterpret_cast<std::byte*>(all.data());
        group.run(operation, kNoInterrupt);
        std::vector<std::int64_t> expected;
        for (int rank = 0; rank < group.size(); ++rank) {
          const auto theirs = contribution(rank, count);
          expected.insert(expected.end(), theirs.begin(), theirs.end());
        }
        CHECK(all == expected);
      }
    });
  }
}

TEST(every_rank_hears_of_a_mismatch_before_data_is_written) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() == 1) continue;
    std::atomic<int> untouched = 0;
    const auto errors = run_ranks_catching(hosts, [&](Group& group) {
      auto values = contribution(group.rank(), group.rank() == 1 ? 11 : 10);
      const auto before = values;
      try {
        group.run(sum_of(values), kNoInterrupt);
      } catch (const pycomm::MismatchError&) {
        untouched += values == before ? 1 : 0;
        throw;
      }
    });
    CHECK_EQUAL(untouched.load(), static_cast<int>(hosts.size()));
    for (const auto& error : errors) {
      CHECK(contains(error, "rank 1 made all_reduce of 11 int64"));
      CHECK(contains(error, "all_reduce of 10 int64"));
    }
  }
}

TEST(leaving_while_others_still_call_is_a_mismatch_for_all) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() == 1) continue;
    const auto errors = run_ranks_catching(hosts, [](Group& group) {
      auto values = contribution(group.rank(), 10);
      group.run(sum_of(values), kNoInterrupt);
      if (group.rank() == 0) group.run(sum_of(values), kNoInterrupt);
    });
    for (const auto& error : errors) CHECK(contains(error, "made shutdown"));
  }
}

TEST(leaving_while_others_wait_in_another_group_is_a_mismatch) {
  const auto errors = run_ranks_catching({0, 0, 0}, [](Group& group) {
    const auto other = group.duplicate(kNoInterrupt);
    auto values = contribution(group.rank(), 10);
    if (group.rank() != 0) other->run(sum_of(values), kNoInterrupt);
  });
  for (const int rank : {1, 2}) {
    CHECK(contains(errors[static_cast<std::size_t>(rank)], "rank 0 called shutdown() instead"));
  }
  CHECK(contains(errors[0], "rank "));  // ends too, with what a waiting rank has failed of
}

TEST(a_rank_that_comes_late_to_shutdown_is_waited_for) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 0, 1, 1}}) {
    // Rank 0 shuts down without waiting for its last operation, whose memory outlives it.
    std::vector<std::vector<std::int64_t>> values(hosts.size());
    run_ranks(hosts, [&](Group& group) {
      auto& mine = values[static_cast<std::size_t>(group.rank())];
      mine = contribution(group.rank(), 10);
      const auto other = group.duplicate(kNoInterrupt);
      if (group.rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1500));
      const auto work = other->start(sum_of(mine));
      if (group.rank() != 0) work->wait(kNoInterrupt);
    });
  }
}

TEST(leaving_after_an_error_is_told_to_those_who_wait_in_another_group) {
  const auto errors = run_ranks_catching({0, 0}, [](Group& group) {
    const auto other = group.duplicate(kNoInterrupt);
    auto values = contribution(group.rank(), 10);
    if (group.rank() == 1) return other->run(sum_of(values), kNoInterrupt);
    group.abort("a failure that rank 0 catches");
  });
  CHECK_EQUAL(errors[0], std::string());
  CHECK(contains(errors[1], "rank 0 called shutdown() instead"));
}

TEST(after_shutdown_every_call_raises) {
  const auto worlds = pycomm::World::loopback({0}, {5, std::size_t{64} << 20, {}});
  const auto group = worlds[0]->group();
  const auto other = group->duplicate(kNoInterrupt);
  worlds[0]->close(kNoInterrupt);
  auto values = contribution(0, 10);
  for (int attempt = 0; attempt < 2; ++attempt) {
    CHECK_THROWS(other->start(sum_of(values)), pycomm::CommError, "pycomm was shut down");
    CHECK_THROWS(group->run(sum_of(values), kNoInterrupt), pycomm::CommError, "was shut down");
  }
}

TEST(dropped_groups_give_their_memory_back_on_every_rank) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      const auto offset_after = [&](int rounds) {
        for (int i = 0; i < rounds; ++i) {
          group.duplicate(kNoInterrupt);
          Operation barrier;
          group.run(barrier, kNoInterrupt);
        }
        return group.allocate(std::size_t{16} << 20)->offset();
      };
      const auto before = offset_after(2);
      CHECK_EQUAL(offset_after(10), before);
    });
  }
}

TEST(a_rank_that_does_not_come_is_named) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() == 1) continue;
    const auto errors = run_ranks_catching(
        hosts,
        [](Group& group) {
          auto values = contribution(group.rank(), 10);
          if (group.rank() == 1) return std::this_thread::sleep_for(std::chrono::seconds(1));
          group.run(sum_of(values), kNoInterrupt);
        },
        /*timeout_s=*/0.3);
    CHECK(contains(errors[0], "timeout after 0.3 s"));
    // Between hosts a rank knows whose message it misses, not yet who holds that one up.
    const bool one_host = std::count(hosts.begin(), hosts.end(), 0) == std::ssize(hosts);
    CHECK(contains(errors[0],
                   one_host ? "waiting for rank 1 to make this call" : "waiting for rank "));
  }
}

TEST(a_failed_reduction_in_the_arena_keeps_its_buffer_from_reuse) {
  // A peer that was only stopped may still fold into it. Every way of running has its own path.
  for (const int way : {0, 1, 2}) {
    const auto errors = run_ranks_catching({0, 0}, [&](Group& group) {
      const auto other = group.duplicate(kNoInterrupt);
      if (group.rank() == 1) return std::this_thread::sleep_for(std::chrono::milliseconds(600));
      const std::size_t bytes = std::size_t{1} << 20;
      auto block = group.allocate(bytes);
      const std::size_t offset = block->offset();
      Operation operation;
      operation.kind = Kind::kAllReduce;
      operation.dtype = pycomm::DType::kInt64;
      operation.count = bytes / sizeof(std::int64_t);
      operation.input = operation.output = block->data();
      operation.timeout_s = 0.1;
      const auto run = [&] {
        if (way == 0) return other->run(operation, kNoInterrupt);
        if (way == 1) return other->start(operation)->wait(kNoInterrupt);
        const auto turn = next_turn(*other);
        turn->start(operation);
        turn->wait(kNoInterrupt);
      };
      CHECK_THROWS(run(), pycomm::CommTimeoutError, "waiting for rank 1");
      block.reset();
      CHECK(group.allocate(bytes)->offset() != offset);
    });
    for (const auto& error : errors) CHECK_EQUAL(error, std::string());
  }
}

TEST(shutdown_in_the_middle_of_a_call_is_told_to_those_who_come_later) {
  std::string told;
  const auto errors = run_worlds_catching(
      {0, 0},
      [&](pycomm::World& world) {
        const auto other = world.group()->duplicate(kNoInterrupt);
        auto values = contribution(world.group()->rank(), 1000);
        if (world.group()->rank() == 0) {
          const auto work = other->start(sum_of(values));
          CHECK_THROWS(world.close(kNoInterrupt, 0.3), pycomm::CommTimeoutError, "shutdown");
          CHECK_THROWS(work->wait(kNoInterrupt), pycomm::CommError, "abandoned");
          return;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(800));
        // Rank 0 has announced its part, so nothing else would tell that it does not go on.
        try {
          other->run(sum_of(values), kNoInterrupt);
        } catch (const pycomm::MismatchError& error) {
          told = error.what();
        }
      },
      {5, std::size_t{64} << 20, {}});
  CHECK_EQUAL(errors[0], std::string());
  CHECK(contains(told, "called shutdown() before it had ended"));
}

TEST(after_an_error_the_group_is_finished) {
  run_ranks_catching({0, 0}, [](Group& group) {
    auto values = contribution(group.rank(), group.rank() == 1 ? 11u : 10u);
    for (int attempt = 0; attempt < 2; ++attempt) {
      std::string text;
      try {
        group.run(sum_of(values), kNoInterrupt);
      } catch (const pycomm::MismatchError& error) {
        text = error.what();
      }
      CHECK(contains(text, "differs"));
    }
    CHECK(group.failed());
  });
}

TEST(bad_arguments_leave_the_group_usable) {
  run_ranks({0, 0}, [](Group& group) {
    auto values = contribution(group.rank(), 10);
    auto average = sum_of(values);
    average.op = pycomm::ReduceOp::kAvg;
    std::string text;
    try {
      group.run(average, kNoInterrupt);
    } catch (const pycomm::InvalidArgumentError& error) {
      text = error.what();
    }
    CHECK(contains(text, "int64 cannot be reduced with AVG"));
    group.run(sum_of(values), kNoInterrupt);
    check_sum(values, group.size());
  });
}

TEST(a_rank_that_ends_well_learns_at_shutdown_that_another_failed) {
  const auto errors = run_ranks_catching({0, 0}, [](Group& group) {
    if (group.rank() == 0) throw std::runtime_error("boom");
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  });
  CHECK_EQUAL(errors[0], std::string("boom"));
  CHECK_EQUAL(errors[1], std::string("rank 0 failed: boom"));
}

TEST(an_interrupted_call_ends_and_the_peers_hear_of_it) {
  struct Interrupted : std::exception {
    const char* what() const noexcept override { return "interrupted"; }
  };
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    const auto errors = run_ranks_catching(
        hosts,
        [](Group& group) {
          auto values = contribution(group.rank(), 100);
          if (group.rank() == 0) {
            group.run(sum_of(values), [] { throw Interrupted(); });
          }
          std::this_thread::sleep_for(std::chrono::milliseconds(500));
          // The first may still end well: rank 0 had announced its part before it left.
          group.run(sum_of(values), kNoInterrupt);
          group.run(sum_of(values), kNoInterrupt);
        },
        /*timeout_s=*/5);
    CHECK_EQUAL(errors[0], std::string("interrupted"));
    CHECK(contains(errors[1], "was interrupted in all_reduce"));
  }
}
