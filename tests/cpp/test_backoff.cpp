// How a thread that waits behaves where its core is not its own.

#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "group/backoff.h"
#include "transport/doorbell.h"

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

/// All threads made in its time run on one core, which one of them keeps busy.
class TakenCore {
 public:
  TakenCore() {
    sched_getaffinity(0, sizeof(before_), &before_);
    int core = 0;
    while (!CPU_ISSET(core, &before_)) ++core;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    CHECK_EQUAL(sched_setaffinity(0, sizeof(one), &one), 0);
    stranger_ = std::thread([this] {
      while (!over_.load(std::memory_order_relaxed)) {
      }
    });
  }
  ~TakenCore() {
    over_ = true;
    stranger_.join();
    sched_setaffinity(0, sizeof(before_), &before_);
  }
  TakenCore(const TakenCore&) = delete;
  TakenCore& operator=(const TakenCore&) = delete;

 private:
  cpu_set_t before_{};
  std::atomic<bool> over_{false};
  std::thread stranger_;
};

struct Wait {
  int relaxes = 0;
  Clock::duration awake{};
};

/// A wait that nothing ends, up to its first sleep.
Wait until_sleep(pycomm::Doorbell& bell, bool may_spin) {
  pycomm::Backoff backoff(bell, may_spin);
  Wait wait{1, {}};
  const auto began = Clock::now();
  const auto about_to_sleep = [&] {
    wait.awake = Clock::now() - began;
    return false;
  };
  while (!backoff.relax(about_to_sleep, [] { return false; })) ++wait.relaxes;
  return wait;
}

}  // namespace

TEST(who_has_lost_its_core_to_a_stranger_sleeps_at_once_in_the_next_wait) {
  constexpr int kSpins = 400;
  pycomm::Doorbell bell;
  const TakenCore taken;
  // The scheduler may keep this thread off its core for longer than it remembers strangers.
  bool slept_at_once = false;
  for (int attempt = 0; attempt < 50 && !slept_at_once; ++attempt) {
    until_sleep(bell, true);
    const Wait next = until_sleep(bell, true);
    slept_at_once = next.relaxes <= kSpins + 2 && next.awake < 300us;  // no turn of the stranger's
  }
  CHECK(slept_at_once);
}

TEST(ranks_that_share_a_core_yield_it_to_each_other) {
  pycomm::Doorbell bell;
  const TakenCore taken;
  until_sleep(bell, false);
  CHECK(until_sleep(bell, false).relaxes > 8);
}
