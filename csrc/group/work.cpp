#include "group/work.h"

#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"
#include "group/backoff.h"

namespace pycomm {

bool Work::settled() const {
  if (!done()) return false;
  if (device_call_ == nullptr) return true;
  try {  // one that has failed, too: what was launched ends when it is aborted
    return device_call_->finished();
  } catch (const CommError&) {
    return true;  // the GPU is lost, and with it the memory
  }
}

void Work::wait(const InterruptCheck& check_interrupt) {
  if (in_forked_child() && !done()) {  // its end would be noted in the parent's memory only
    throw CommError(
        "wait: this process was forked from a rank while the operation was under way there, and "
        "never learns of its end. Wait in the parent, or before the fork.");
  }
  await();
  Backoff backoff(doorbell_);  // the progress thread needs a core to end the operation
  Roster::Waiting waiting(roster_.get(), group_tag_);
  while (!done()) {
    if (!backoff.relax([this] { return done(); }, [] { return true; })) continue;
    if (roster_ != nullptr) waiting.slept();
    check_interrupt();
  }
  if (error_) std::rethrow_exception(error_);
}

void Work::announce_to(std::shared_ptr<Completions> completions, Completions::Ticket ticket) {
  completions_ = std::move(completions);
  ticket_ = ticket;
  if (watch_.exchange(Watch::kWatched, std::memory_order_acq_rel) == Watch::kOver) {
    completions_->add(ticket_);
  }
}

void Work::complete(std::exception_ptr error, double seconds) {
  error_ = std::move(error);
  seconds_ = seconds;
  done_.store(true, std::memory_order_release);
  doorbell_.ring();
  if (watch_.exchange(Watch::kOver, std::memory_order_acq_rel) == Watch::kWatched) {
    completions_->add(ticket_);
  }
}

}  // namespace pycomm
