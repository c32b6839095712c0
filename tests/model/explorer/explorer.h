#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// Runs threads of the shared-memory protocol, as it stands in csrc/, through schedules and through
// what the C++ memory model lets their loads see.
//
// The code under test is compiled with -fsanitize=thread, by which the compiler announces every
// access to memory and every atomic operation with its order, and linked with explorer.cpp in the
// place of that sanitizer's library. Threads are fibers of one thread of the system; whose turn it
// is, and which store a load reads, are decisions that a seed or a search makes. So a failure
// replays from its seed.
//
// What is modelled: every atomic object has its stores in one order, which is the order in which
// they were executed; a load may read any that is not hidden by what its thread has seen; release
// and acquire, release sequences, fences, and membarrier(2) pass on what was seen. Not modelled:
// loads that read stores which come later in the execution, and stores of two threads to one object
// that take effect in another order. Ordinary accesses to shared memory must be ordered by
// happens-before, whatever the schedule: a race is a failure.

namespace explore {

/// What one execution consists of.
struct Setup {
  std::vector<std::function<void()>> threads;
  /// Once all threads have ended, or died: the last checks. Optional.
  std::function<void()> after;
  /// By thread: the word that the kernel marks when the thread dies; empty: none dies.
  std::vector<void*> life_words;
  /// Which thread may die.
  std::size_t mortal = 0;
  /// Sleeps end by themselves once nobody else can go on; otherwise that is a failure, and only
  /// after a death they do.
  bool sleeps_end = false;

  /// Accesses to this memory are followed. What it holds now, all threads know.
  void share(const void* memory, std::size_t bytes);
};

/// Called before each execution: prepares memory and threads.
using Scenario = std::function<void(Setup&)>;

struct Plan {
  std::uint64_t seed = 1;
  /// At most so many executions.
  std::uint64_t executions = 1000;
  /// All schedules with at most so many preemptions, one after the other, instead of random ones;
  /// a load then reads the newest store or the one before; -1: random.
  int preemptions = -1;
  /// The mortal thread dies before its step of this number; -1: anywhere, or nowhere.
  int dies_at = -1;
  /// Weaken this site to relaxed order.
  const void* weakened = nullptr;
};

struct Result {
  std::string violation;   // empty: none was found
  std::uint64_t seed = 0;  // whose execution has it
  std::uint64_t executions = 0;
  std::uint64_t steps = 0;
  bool complete = false;  // every schedule within the bounds was run
  /// The most steps that the mortal thread has taken.
  int mortal_steps = 0;
};

Result run(const Scenario& scenario, const Plan& plan);

/// An instruction with an order that could be weaker.
struct Site {
  const void* address;
  enum class Kind { kLoad, kStore, kReadModifyWrite, kFence, kMembarrier } kind;
  int order;

  /// "window.cpp:35: mine.sequence.store(sequence, std::memory_order_release);"
  std::string describe() const;
};

/// All that the executions so far have come by.
const std::vector<Site>& sites();

// --- for threads ---------------------------------------------------------------------------------

/// This thread's wait is not over: let others go on until something it could see has changed.
void pause();

/// Ends the execution with a failure.
[[noreturn]] void violation(const std::string& text);

inline void require(bool condition, const char* text) {
  if (!condition) violation(text);
}

// --- the kernel ----------------------------------------------------------------------------------

enum class Membarrier {
  kReachesAll,
  kRefused,
  /// The other threads belong to processes that could not register.
  kReachesNobody
};
/// Of this execution, to be said while it is set up; by default it reaches all.
void set_membarrier(Membarrier kind);

}  // namespace explore
