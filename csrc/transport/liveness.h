#pragma once

#include <linux/futex.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pycomm {

/// A word in shared memory that the kernel marks when the process behind it dies, however it dies.
///
/// It is a robust futex: one thread that lives as long as the process holds it, and the kernel sets
/// FUTEX_OWNER_DIED in it while the process exits, before its memory is torn down (0.1 ms after a
/// SIGKILL, whatever the size of the process). Reading it costs a load.
class LifeWord {
 public:
  bool owner_died() const {
    return (word_.load(std::memory_order_acquire) & FUTEX_OWNER_DIED) != 0;
  }

  /// What the kernel does, for a simulation.
  void mark_owner_died() { word_.fetch_or(FUTEX_OWNER_DIED, std::memory_order_release); }

 private:
  friend class LifeKeeper;
  std::atomic<std::uint32_t> word_{0};
};

/// Holds a LifeWord for the calling thread, from construction to destruction. The thread must not
/// use robust pthread mutexes, because it has one robust list.
class LifeKeeper {
 public:
  explicit LifeKeeper(LifeWord& word);
  ~LifeKeeper();
  LifeKeeper(const LifeKeeper&) = delete;
  LifeKeeper& operator=(const LifeKeeper&) = delete;

 private:
  LifeWord& word_;
  robust_list entry_;
  robust_list_head head_;
  robust_list_head* previous_ = nullptr;
  std::size_t previous_bytes_ = 0;
};

}  // namespace pycomm
