#include "group/work.h"

#include <utility>

#include "group/backoff.h"

namespace pycomm {

void Work::wait(const InterruptCheck& check_interrupt) {
  // Never spin: the progress thread of this very process needs a core to end the operation.
  Backoff backoff(doorbell_, /*may_spin=*/false);
  while (!done()) {
    if (backoff.relax([this] { return done(); }, [] { return true; })) check_interrupt();
  }
  if (error_) std::rethrow_exception(error_);
}

void Work::complete(std::exception_ptr error, double seconds) {
  error_ = std::move(error);
  seconds_ = seconds;
  done_.store(true, std::memory_order_release);
  doorbell_.ring();
}

}  // namespace pycomm
