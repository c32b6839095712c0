#pragma once

#include <sched.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "core/simulation.h"

namespace pycomm {

/// Give the core to another thread that can run.
inline void yield_core() {
  if (auto* const simulation = Simulation::current()) return simulation->yield();
  sched_yield();
}

/// std::thread, or a simulation's.
class Thread {
 public:
  explicit Thread(std::function<void()> body) {
    if (auto* const simulation = Simulation::current()) {
      simulated_ = simulation->start(std::move(body));
    } else {
      thread_ = std::thread(std::move(body));
    }
  }

  void join() {
    if (auto* const simulation = Simulation::current()) {
      return simulation->join(simulated_);
    }
    thread_.join();
  }
  void detach() { thread_.detach(); }

 private:
  std::thread thread_;
  Simulation::ThreadId simulated_ = -1;
};

/// std::condition_variable, or a simulation's, which asks `ready()` as often as it likes.
class Condition {
 public:
  void notify_one() { condition_.notify_one(); }

  template <typename Ready>
  void wait(std::unique_lock<std::mutex>& lock, const Ready& ready) {
    if (Simulation::current() != nullptr) {
      wait_for(lock, std::chrono::nanoseconds::max(), ready);
    } else {
      condition_.wait(lock, ready);
    }
  }

  /// What `ready()` says in the end.
  template <typename Ready>
  bool wait_for(std::unique_lock<std::mutex>& lock, std::chrono::nanoseconds timeout,
                const Ready& ready) {
    if (auto* const simulation = Simulation::current()) {
      lock.unlock();
      simulation->wait(ready, timeout);
      lock.lock();
      return ready();
    }
    return condition_.wait_for(lock, timeout, ready);
  }

 private:
  std::condition_variable condition_;
};

}  // namespace pycomm
