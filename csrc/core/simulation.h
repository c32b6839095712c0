#pragma once

#include <atomic>
#include <chrono>
#include <functional>

namespace pycomm {

/// Stands in for the machine wherever the core meets it: the clock, the scheduler, the kernel's
/// word for a dead process. Tests install one, in which a single thread plays every thread of every
/// rank in an order drawn from a seed (tests/simulation). Otherwise there is none, and each such
/// place costs a load and a branch that is not taken.
class Simulation {
 public:
  /// A thread of the simulated machine.
  using ThreadId = int;

  /// Null: the machine itself.
  static Simulation* current() { return current_.load(std::memory_order_relaxed); }
  /// @param simulation  outlives everything that is made from now on until the next call.
  static void install(Simulation* simulation) {
    current_.store(simulation, std::memory_order_relaxed);
  }

  virtual ~Simulation() = default;

  /// Since some beginning.
  virtual std::chrono::nanoseconds now() = 0;

  /// Other threads may run. Called without any lock held.
  virtual void yield() = 0;

  /// Block the calling thread until `ready()` or for `timeout`; what ready() says in the end.
  /// Called without any lock held.
  virtual bool wait(const std::function<bool()>& ready, std::chrono::nanoseconds timeout) = 0;

  /// The calling process has just shown others something: they may go on before it does, or it may
  /// die here. Locks may be held, so no other thread of this process runs in between.
  virtual void interleave() = 0;

  /// Start a thread of the calling thread's process; returns at its first wait.
  virtual ThreadId start(std::function<void()> body) = 0;
  /// Wait for its end.
  virtual void join(ThreadId thread) = 0;
  /// The calling one.
  virtual ThreadId running() const = 0;

 private:
  static inline constinit std::atomic<Simulation*> current_{nullptr};
};

}  // namespace pycomm
