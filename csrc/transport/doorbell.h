#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace pycomm {

/// Where the threads of one process sleep until something they wait for may have happened. It lies
/// in the process's arena, so peers ring it as well as its own threads.
///
/// Protocol: who changes a condition stores it with release order, then calls ring(). Who waits
/// calls listen(), looks at the condition once more, sleeps if it still does not hold, and leaves.
/// The two fences make it impossible that the ringer sees no sleeper and the sleeper the old
/// condition (Dekker). Rings are rare: a ring without sleepers is a fence and a load.
class Doorbell {
 public:
  /// Wake all sleepers, if there are any.
  void ring() {
    fence();
    ring_after_fence();
  }

  /// ring() in two parts, for who rings several doorbells after one change.
  static void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
  void ring_after_fence() {
    if (sleepers_.load(std::memory_order_relaxed) != 0) wake();
  }

  /// Announce that this thread is about to sleep; returns the ticket for sleep().
  std::uint32_t listen();
  /// Sleep until rung or `timeout`.
  void sleep(std::uint32_t ticket, std::chrono::nanoseconds timeout);
  /// Withdraw the announcement made by listen().
  void leave();

 private:
  void wake();

  alignas(64) std::atomic<std::uint32_t> sleepers_{0};
  alignas(64) std::atomic<std::uint32_t> rings_{0};
};

}  // namespace pycomm
