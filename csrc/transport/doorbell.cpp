#include "transport/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace pycomm {

static_assert(sizeof(std::atomic<std::uint32_t>) == 4, "a futex is a plain 32-bit word");

void Doorbell::wake() {
  rings_.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &rings_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

std::uint32_t Doorbell::listen() {
  sleepers_.fetch_add(1, std::memory_order_relaxed);
  const std::uint32_t ticket = rings_.load(std::memory_order_acquire);
  fence();
  return ticket;
}

void Doorbell::sleep(std::uint32_t ticket, std::chrono::nanoseconds timeout) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  const timespec relative{static_cast<time_t>(seconds.count()),
                          static_cast<long>((timeout - seconds).count())};
  // Whatever ends the sleep (a ring, the timeout, a signal), the caller looks again.
  syscall(SYS_futex, &rings_, FUTEX_WAIT, ticket, &relative, nullptr, 0);
}

void Doorbell::leave() { sleepers_.fetch_sub(1, std::memory_order_relaxed); }

}  // namespace pycomm
