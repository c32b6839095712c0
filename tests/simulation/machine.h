#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/simulation.h"
#include "fiber.h"
#include "random.h"

namespace simulation {

using std::chrono::nanoseconds;

/// What cannot go on: the seed has found something.
class Violation : public std::exception {
 public:
  explicit Violation(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

/// How the machine's scheduler behaves, drawn from the seed.
struct Habits {
  enum class Order { kUniform, kBursts, kPriorities };
  Order order = Order::kUniform;
  /// What a step takes, on average.
  nanoseconds step{10'000};
  /// Of a process being interrupted where it has just shown something.
  double interleave = 0.3;
  /// Of a sleep that lasts longer than was asked for.
  double oversleep = 0.1;
};

/// One thread that plays all threads of all ranks, one step at a time, on a clock of its own.
class Machine : public pycomm::Simulation {
 public:
  Machine(int ranks, std::uint64_t seed, const Habits& habits);
  ~Machine() override;

  // For the core.
  nanoseconds now() override { return now_; }
  void yield() override;
  bool wait(const std::function<bool()>& ready, nanoseconds timeout) override;
  void interleave() override;
  ThreadId start(std::function<void()> body) override;
  void join(ThreadId thread) override;

  /// Start a thread of a rank. From outside, start() does so for the rank that is set here.
  void set_rank(int rank) { rank_ = rank; }
  int rank() const { return rank_; }
  /// The thread that runs; -1 outside all.
  ThreadId running() const override { return running_; }

  /// Go on until `over()`. @throws Violation  that would never be, or not before `horizon`.
  void run(const std::function<bool()>& over, nanoseconds horizon);

  /// Called after a thread of `rank` has come to a point where it may be stopped.
  std::function<void(int rank)> at_point;
  /// Called before a thread is started from outside.
  std::function<void()> on_start;
  /// What happens by itself: when next (max: never), and doing what is due.
  std::function<nanoseconds()> next_event;
  std::function<void()> do_events;

  /// Nothing of the rank runs any more.
  void stop(int rank) { stopped_[index(rank)] = true; }
  void go_on(int rank) { stopped_[index(rank)] = false; }
  bool stopped(int rank) const { return stopped_[index(rank)]; }
  /// Something has moved on: sleeps need not be stretched.
  void note_progress() { quiet_ = 0; }
  std::uint64_t steps() const { return steps_; }
  /// One number over every choice made so far: equal runs have equal numbers.
  std::uint64_t trace() const { return trace_; }

 private:
  struct Thread {
    int rank;
    std::unique_ptr<Fiber> fiber;
    const std::function<bool()>* ready = nullptr;  // null: it can run
    nanoseconds wake_at{0};
    int priority = 0;
  };
  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }

  bool can_run(ThreadId id);
  /// One step of some thread, or of the clock.
  void step();
  ThreadId choose();
  void resume(ThreadId id);
  /// The running thread gives way; @param alone  and no other one of its rank runs meanwhile.
  void suspend(bool alone);
  nanoseconds stretched(nanoseconds timeout);

  Random random_;
  const Habits habits_;
  std::vector<Thread> threads_;
  std::vector<bool> stopped_;
  std::vector<ThreadId> alone_;  // by rank; -1: none
  std::vector<ThreadId> candidates_;
  int rank_ = 0;
  ThreadId running_ = -1;
  ThreadId last_ = -1;
  int lowest_priority_ = 0;
  nanoseconds now_{0};
  std::uint64_t steps_ = 0;
  std::uint64_t quiet_ = 0;  // steps since something moved on
  std::uint64_t trace_ = 0;
};

}  // namespace simulation
