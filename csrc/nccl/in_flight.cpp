#include "nccl/in_flight.h"

#include <cstdio>

#include "core/error.h"

namespace pycomm::nccl {

void InFlight::poll(const Communicator& communicator) {
  while (!calls_.empty() && calls_.front().call->finished()) calls_.pop_front();
  if (calls_.empty()) return;
  const Launched& first = calls_.front();
  communicator.accepted();
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
