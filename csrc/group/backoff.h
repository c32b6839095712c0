#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "core/clock.h"
#include "core/pause.h"
#include "core/simulation.h"
#include "core/thread.h"
#include "transport/doorbell.h"

namespace pycomm {

/// How a thread waits: it spins for a moment if every rank has a core, gives its core away for a
/// while, then sleeps at the doorbell. Ranks outnumber cores often enough that a waiting rank must
/// never keep a core from the one it waits for.
///
/// How long it stays awake is counted in its own processor time. Ranks that share a core wait for
/// each other's folds, which cost the one that yields nothing; if it slept, a wake-up would follow
/// each of them. It sleeps all the same after milliseconds: who works that long gives the core back
/// at the scheduler's next tick to one that yields, but at once to one that wakes up.
///
/// Where every rank has a core, whoever takes it from one that yields is a stranger: another job, a
/// worker that loads data. That one would take it for milliseconds with every yield, so a rank that
/// has seen it sleeps at once for a while.
class Backoff {
 public:
  /// For a thread that drives what it waits for.
  /// @param may_spin  every rank has a core.
  Backoff(Doorbell& doorbell, bool may_spin)
      : doorbell_(doorbell), may_spin_(may_spin), most_spent_(std::chrono::microseconds(500)) {}

  /// For a thread that another one of its process waits for, or works for. It never spins, since
  /// the two may share a core, and does not stay awake for long, since both would.
  explicit Backoff(Doorbell& doorbell)
      : doorbell_(doorbell), may_spin_(false), most_spent_(std::chrono::microseconds(100)) {}

  /// Take steps until `done`: for a thread that drives what it waits for.
  /// @param step   goes on as far as possible; true if anything has changed.
  /// @param check  looks at deadlines and peers, after each sleep.
  template <typename Done, typename Step, typename Check>
  void drive(const Done& done, const Step& step, const Check& check) {
    while (!done()) {
      if (step()) {
        reset();
      } else if (relax(step, [] { return true; })) {
        check();
      }
    }
  }

  /// Something happened: start over with the next wait.
  void reset() { rounds_ = 0; }

  /// Nothing has happened yet. Relaxes once, as long as is fitting by now.
  ///
  /// @param poll           looks once more before the thread sleeps; true: do not sleep.
  /// @param rings_doorbell asked then: whether who ends the wait rings; if not, sleeps are short.
  /// @return  true after a sleep: time to look at deadlines and peers.
  template <typename Poll, typename Rings>
  bool relax(Poll&& poll, Rings&& rings_doorbell) {
    if (rounds_++ == 0) {
      watched_ = false;
      nap_ = kShortestNap;
      sleepy_ = false;
    }
    if (!sleepy_) {
      if (may_spin_ && rounds_ < kSpins) {
        pause();
        return false;
      }
      sleepy_ = meets_strangers() || (rounds_ % kYieldsPerLook == 0 && awake_long_enough());
      return false;
    }
    const Listener listener(doorbell_);
    if (poll()) {
      reset();
      return false;
    }
    doorbell_.sleep(listener.ticket, rings_doorbell() ? kLongestSleep : nap_);
    nap_ = std::min(nap_ + nap_ / 4, kLongestNap);  // a wait ends about a quarter late
    return true;
  }

 private:
  /// At the doorbell, as long as it lives.
  struct Listener {
    explicit Listener(Doorbell& bell) : doorbell(bell), ticket(bell.listen()) {}
    ~Listener() { doorbell.leave(); }
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    Doorbell& doorbell;
    const std::uint32_t ticket;
  };

  /// Yields, unless a stranger is about. True if one is.
  bool meets_strangers() {
    if (!may_spin_) {
      yield_core();
      return false;
    }
    thread_local Clock::time_point among_strangers_until;
    const auto before = Clock::now();
    if (before < among_strangers_until) return true;
    yield_core();
    const auto after = Clock::now();
    if (after - before < kStrangersTurn) return false;
    among_strangers_until = after + kAmongStrangers;
    return true;
  }

  /// Starts the clocks when first asked, so that a wait of a few yields reads none.
  bool awake_long_enough() {
    if (!watched_) {
      watched_ = true;
      began_ = Clock::now();
      spent_ = processor_time();
      return false;
    }
    return Clock::now() - began_ > kLongestAwake || processor_time() - spent_ > most_spent_;
  }

  /// What this thread has used. A system call that takes as long as a yield to nobody.
  static std::chrono::nanoseconds processor_time() {
    if (Simulation::current() != nullptr) return Clock::now().time_since_epoch();
    timespec used;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return std::chrono::seconds(used.tv_sec) + std::chrono::nanoseconds(used.tv_nsec);
  }

  static constexpr int kSpins = 400;  // about 20 us
  static constexpr int kYieldsPerLook = 8;
  static constexpr std::chrono::nanoseconds kStrangersTurn = std::chrono::microseconds(500);
  static constexpr std::chrono::nanoseconds kAmongStrangers = std::chrono::milliseconds(25);
  static constexpr std::chrono::nanoseconds kLongestAwake = std::chrono::milliseconds(2);
  static constexpr std::chrono::nanoseconds kLongestSleep = std::chrono::milliseconds(50);
  static constexpr std::chrono::nanoseconds kShortestNap = std::chrono::microseconds(50);
  static constexpr std::chrono::nanoseconds kLongestNap = std::chrono::milliseconds(1);

  Doorbell& doorbell_;
  const bool may_spin_;
  const std::chrono::nanoseconds most_spent_;  // of the processor, before it sleeps
  int rounds_ = 0;
  bool sleepy_ = false;
  bool watched_ = false;  // what follows was read
  Clock::time_point began_;
  std::chrono::nanoseconds spent_{0};
  std::chrono::nanoseconds nap_ = kShortestNap;
};

}  // namespace pycomm
