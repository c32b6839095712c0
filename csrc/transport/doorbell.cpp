#include "transport/doorbell.h"

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

#include "core/simulation.h"

namespace pycomm {
namespace {

static_assert(sizeof(std::atomic<std::uint32_t>) == 4, "a futex is a plain 32-bit word");

bool membarrier(int command) { return syscall(SYS_membarrier, command, 0, 0) == 0; }

}  // namespace

// Until the first doorbell is made it is not known that they need not.
constinit std::atomic<bool> Doorbell::fences_{true};

Doorbell::Doorbell() {
  if (Simulation::current() != nullptr) {
    state_.store(kRingersFence, std::memory_order_relaxed);  // every ring is seen
    return;
  }
  // The expedited kind, since the other waits for milliseconds; the global one, since ringers are
  // other processes.
  if (membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED) &&
      membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED)) {
    fences_.store(false, std::memory_order_relaxed);
  } else {
    state_.store(kRingersFence, std::memory_order_relaxed);
  }
}

void Doorbell::ring_slowly() {
  if (auto* const simulation = Simulation::current()) simulation->interleave();
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if ((state_.load(std::memory_order_relaxed) & ~kRingersFence) == 0) return;
  rings_.fetch_add(1, std::memory_order_release);
  if (Simulation::current() != nullptr) return;  // looks at the number
  syscall(SYS_futex, &rings_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

std::uint32_t Doorbell::listen() {
  const std::uint32_t state = state_.fetch_add(1, std::memory_order_relaxed);
  const std::uint32_t ticket = rings_.load(std::memory_order_acquire);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if ((state & kRingersFence) == 0) membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED);
  return ticket;
}

void Doorbell::sleep(std::uint32_t ticket, std::chrono::nanoseconds timeout) {
  if (auto* const simulation = Simulation::current()) {
    const auto rung = [&] { return rings_.load(std::memory_order_acquire) != ticket; };
    simulation->wait(rung, timeout);
    return;
  }
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  const timespec relative{static_cast<time_t>(seconds.count()),
                          static_cast<long>((timeout - seconds).count())};
  // Whatever ends the sleep (a ring, the timeout, a signal), the caller looks again.
  syscall(SYS_futex, &rings_, FUTEX_WAIT, ticket, &relative, nullptr, 0);
}

void Doorbell::leave() { state_.fetch_sub(1, std::memory_order_relaxed); }

}  // namespace pycomm
