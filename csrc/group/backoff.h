#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "core/pause.h"
#include "transport/doorbell.h"

namespace pycomm {

/// How a thread waits: it spins for a moment if every rank has a core, gives its core away for a
/// moment, then sleeps at the doorbell. Ranks outnumber cores often enough that a waiting rank must
/// never keep a core from the one it waits for.
class Backoff {
 public:
  using Clock = std::chrono::steady_clock;

  Backoff(Doorbell& doorbell, bool may_spin) : doorbell_(doorbell), may_spin_(may_spin) {}

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
      began_ = Clock::now();
      nap_ = kShortestNap;
      sleepy_ = false;
    }
    if (!sleepy_) {
      if (may_spin_ && rounds_ < kSpins) {
        pause();
        return false;
      }
      sched_yield();
      sleepy_ = rounds_ % kYieldsPerLook == 0 && Clock::now() - began_ > kAwake;
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

  static constexpr int kSpins = 400;  // about 20 us
  static constexpr int kYieldsPerLook = 8;
  static constexpr std::chrono::nanoseconds kAwake = std::chrono::microseconds(100);
  static constexpr std::chrono::nanoseconds kLongestSleep = std::chrono::milliseconds(50);
  static constexpr std::chrono::nanoseconds kShortestNap = std::chrono::microseconds(50);
  static constexpr std::chrono::nanoseconds kLongestNap = std::chrono::milliseconds(1);

  Doorbell& doorbell_;
  const bool may_spin_;
  int rounds_ = 0;
  bool sleepy_ = false;
  Clock::time_point began_;
  std::chrono::nanoseconds nap_ = kShortestNap;
};

}  // namespace pycomm
