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
/// It must be impossible that the ringer sees no sleeper and the sleeper the old condition
/// (Dekker): between the two accesses of each side there has to be a full fence.
///
/// Operations ring all the time and hardly ever find a sleeper, and a fence would make them wait
/// until their store has fetched its cache line from the peer that polls it. So the sleeper pays
/// for both sides: membarrier(2) interrupts every processor that runs a thread of a registered
/// process, which acts as a fence between whatever two instructions that thread had reached. A
/// ring without sleepers is a load. Where the kernel has no membarrier, or forbids it, ringers
/// fence themselves: `state_` tells those of other processes, `fences_` those of this one.
class Doorbell {
 public:
  /// Registers the process, once, as one whose threads ring.
  Doorbell();

  /// Wake all sleepers, if there are any.
  void ring() {
    fence();
    ring_after_fence();
  }

  /// ring() in two parts, for who rings several doorbells after one change.
  static void fence() {
    if (fences_.load(std::memory_order_relaxed)) {
      std::atomic_thread_fence(std::memory_order_seq_cst);
    } else {
      std::atomic_signal_fence(std::memory_order_seq_cst);  // the compiler keeps the order
    }
  }
  void ring_after_fence() {
    if (state_.load(std::memory_order_relaxed) != 0) ring_slowly();
  }

  /// Announce that this thread is about to sleep; returns the ticket for sleep().
  std::uint32_t listen();
  /// Sleep until rung or `timeout`.
  void sleep(std::uint32_t ticket, std::chrono::nanoseconds timeout);
  /// Withdraw the announcement made by listen().
  void leave();

 private:
  /// In `state_`, beside the number of sleepers: this process cannot call membarrier, so ringers
  /// must fence.
  static constexpr std::uint32_t kRingersFence = std::uint32_t{1} << 31;

  void ring_slowly();

  /// This process could not be registered: its ringers are not reached by membarrier.
  static std::atomic<bool> fences_;

  alignas(64) std::atomic<std::uint32_t> state_{0};
  alignas(64) std::atomic<std::uint32_t> rings_{0};
};

}  // namespace pycomm
