// One thread that learns of many works' ends: Work::announce_to and Completions. Runs under the
// thread sanitizer as well.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "group/completions.h"
#include "group/group.h"
#include "group/work.h"
#include "ranks.h"
#include "transport/doorbell.h"

namespace {

using pycomm::Completions;
using pycomm::Doorbell;
using pycomm::Group;
using pycomm::Operation;
using pycomm::Work;
using Tickets = std::vector<Completions::Ticket>;

/// Many works, of which nobody but the test says when they are over.
std::vector<std::shared_ptr<Work>> works(std::size_t count) {
  static Doorbell doorbell;
  std::vector<std::shared_ptr<Work>> made;
  while (made.size() < count) made.push_back(std::make_shared<Work>(doorbell));
  return made;
}

/// All tickets until close().
Tickets all_of(Completions& completions) {
  Tickets all;
  for (;;) {
    const auto some = completions.next();
    if (some.empty()) return all;
    all.insert(all.end(), some.begin(), some.end());
  }
}

Tickets up_to(std::size_t count) {
  Tickets tickets(count);
  std::iota(tickets.begin(), tickets.end(), 0);
  return tickets;
}

}  // namespace

TEST(works_are_told_in_the_order_of_their_ends) {
  const auto completions = std::make_shared<Completions>();
  const auto some = works(4);
  for (std::size_t i = 0; i < some.size(); ++i) some[i]->announce_to(completions, i);
  for (const std::size_t i : {2, 0, 3}) some[i]->complete(nullptr, 0);
  CHECK(completions->next() == (Tickets{2, 0, 3}));
  some[1]->complete(nullptr, 0);
  CHECK(completions->next() == Tickets{1});
}

TEST(a_work_that_is_over_is_told_at_once) {
  const auto completions = std::make_shared<Completions>();
  const auto some = works(2);
  some[0]->complete(nullptr, 0);
  some[1]->complete(std::make_exception_ptr(pycomm::CommError("lost")), 0);
  some[0]->announce_to(completions, 7);
  CHECK(completions->next() == Tickets{7});
  some[1]->announce_to(completions, 8);
  CHECK(completions->next() == Tickets{8});
  CHECK_THROWS(some[1]->wait([] {}), pycomm::CommError, "lost");
}

TEST(a_work_that_fails_is_told_like_any_other_and_is_over_by_then) {
  const auto completions = std::make_shared<Completions>();
  const auto work = works(1).front();
  work->announce_to(completions, 1);
  std::thread driver([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    work->complete(std::make_exception_ptr(pycomm::CommError("lost")), 0.5);
  });
  CHECK(completions->next() == Tickets{1});  // blocks until then
  CHECK(work->done());
  CHECK_EQUAL(work->seconds(), 0.5);
  CHECK_THROWS(work->wait([] {}), pycomm::CommError, "lost");
  driver.join();
}

TEST(close_lets_every_waiter_go_after_the_last_ticket) {
  Completions completions;
  std::vector<std::thread> waiters;
  std::vector<Tickets> told(3);
  for (auto& mine : told) waiters.emplace_back([&] { mine = all_of(completions); });
  completions.add(1);
  completions.add(2);
  completions.close();
  for (auto& waiter : waiters) waiter.join();
  Tickets all;
  for (const auto& mine : told) all.insert(all.end(), mine.begin(), mine.end());
  std::sort(all.begin(), all.end());
  CHECK(all == (Tickets{1, 2}));
  CHECK(completions.next().empty());  // for ever
}

TEST(nothing_is_lost_or_told_twice_between_many_threads) {
  // Each work is announced by one thread and ended by another, at about the same time; two listen.
  constexpr std::size_t kWorks = 4000;
  constexpr std::size_t kThreads = 3;
  const auto completions = std::make_shared<Completions>();
  const auto all = works(kWorks);
  std::vector<Tickets> told(2);
  std::vector<std::thread> listeners;
  for (auto& mine : told) listeners.emplace_back([&] { mine = all_of(*completions); });
  std::vector<std::thread> others;
  for (std::size_t thread = 0; thread < kThreads; ++thread) {
    others.emplace_back([&, thread] {
      for (std::size_t i = thread; i < kWorks; i += kThreads) all[i]->announce_to(completions, i);
    });
    others.emplace_back([&, thread] {
      for (std::size_t i = thread; i < kWorks; i += kThreads) all[i]->complete(nullptr, 0);
    });
  }
  for (auto& other : others) other.join();
  completions->close();
  for (auto& listener : listeners) listener.join();
  Tickets seen = told[0];
  seen.insert(seen.end(), told[1].begin(), told[1].end());
  std::sort(seen.begin(), seen.end());
  CHECK(seen == up_to(kWorks));
}

TEST(a_work_keeps_its_completions_alive) {
  const auto work = works(1).front();
  auto completions = std::make_shared<Completions>();
  work->announce_to(completions, 3);
  const std::weak_ptr<Completions> still_there = completions;
  completions.reset();
  CHECK(!still_there.expired());
  work->complete(nullptr, 0);
}

TEST(operations_of_a_group_are_told_in_the_order_in_which_they_were_issued) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 0, 1}}) {
    run_ranks(hosts, [](Group& group) {
      constexpr std::size_t kOperations = 200;
      const auto completions = std::make_shared<Completions>();
      std::vector<std::int64_t> values(kOperations, group.rank() + 1);
      std::vector<std::shared_ptr<Work>> started;
      Tickets told;
      std::thread listener([&] {
        while (told.size() < kOperations) {
          const auto some = completions->next();
          told.insert(told.end(), some.begin(), some.end());
        }
      });
      for (std::size_t i = 0; i < kOperations; ++i) {
        Operation sum;
        sum.kind = pycomm::Kind::kAllReduce;
        sum.dtype = pycomm::DType::kInt64;
        sum.count = 1;
        sum.input = reinterpret_cast<const std::byte*>(&values[i]);
        sum.output = reinterpret_cast<std::byte*>(&values[i]);
        started.push_back(group.start(std::move(sum)));
        started.back()->announce_to(completions, i);
      }
      listener.join();
      for (const auto& work : started) CHECK(work->done());
      CHECK(told == up_to(kOperations));
      const std::int64_t expected = group.size() * (group.size() + 1) / 2;
      for (const auto value : values) CHECK_EQUAL(value, expected);
    });
  }
}

TEST(operations_of_a_job_that_was_ended_are_told_too) {
  const auto errors = run_ranks_catching({0, 0}, [](Group& group) {
    if (group.rank() == 0) throw std::runtime_error("boom");
    const auto completions = std::make_shared<Completions>();
    Operation barrier;
    barrier.kind = pycomm::Kind::kBarrier;
    const auto work = group.start(std::move(barrier));
    work->announce_to(completions, 5);
    CHECK(completions->next() == Tickets{5});
    CHECK_THROWS(work->wait([] {}), pycomm::PeerLostError, "boom");
    work->wait([] {});
  });
  CHECK_EQUAL(errors[0], std::string("boom"));
  CHECK(errors[1].find("boom") != std::string::npos);
}
