#include "nccl/in_flight.h"

#include <chrono>
#include <cstdio>

#include "core/error.h"

namespace pycomm::nccl {

void InFlight::poll(const Communicator& communicator) {
  forget_finished();
  if (calls_.empty()) return;
  communicator.accepted();
  check_deadline();
}

void InFlight::poll() {
  forget_finished();
  if (!calls_.empty()) check_deadline();
}

void InFlight::forget_finished() {
  while (!calls_.empty() && calls_.front().call->finished()) calls_.pop_front();
}

void InFlight::check_deadline() const {
  const Launched& first = calls_.front();
  const double seconds = std::chrono::duration<double>(Clock::now() - first.began).count();
  if (seconds <= first.timeout_s) return;
  char waited[32];
  std::snprintf(waited, sizeof(waited), "%.1f s", seconds);
  throw CommTimeoutError(first.description + ": timeout after " + waited +
                         "; it was launched, and the GPU has not finished it.\n  A GPU of the "
                         "group hangs or waits for work before the call. Read the other ranks' "
                         "logs; if it is only slow, raise the timeout.");
}

}  // namespace pycomm::nccl
