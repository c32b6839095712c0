#include "group/execution.h"

#include <algorithm>
#include <cstdio>
#include <vector>

#include "collectives/run.h"
#include "core/error.h"
#include "core/signature.h"
#include "group/absence.h"

namespace pycomm {
namespace {

/// What a leaving rank had issued before may still be in its queue.
constexpr auto kGrace = std::chrono::seconds(1);

Task<> begin(Context& context, const Operation& operation, nccl::GpuGroup* gpus) {
  ++context.sequence;
  return operation.device < 0 ? run_collective(context, operation) : gpus->run(context, operation);
}

}  // namespace

Execution::Execution(Context& context, const Operation& operation, nccl::GpuGroup* gpus)
    : context_(context), operation_(operation), task_(begin(context, operation, gpus)) {
  task_.start(suspension_);
}

bool Execution::advance() {
  if (task_.done()) return true;
  if (!suspension_.wait->poll()) return false;
  suspension_.innermost.resume();
  return true;
}

void check_peers(const Window& window, const std::string& call) {
  window.check_notices();
  if (const int lost = window.lost_peer(); lost >= 0) {
    throw PeerLostError(call + ": rank " + std::to_string(lost) + kIsGone);
  }
}

void Execution::check() {
  check_peers(context_.window, describe());
  check_for_leavers();
  if (seconds() > operation_.timeout_s) {
    time_out();
  } else if (!warned_ && operation_.warn_after_s > 0 && seconds() > operation_.warn_after_s) {
    warned_ = true;
    warn();
  }
}

void Execution::warn() const {
  const Window& window = context_.window;
  const std::vector<int> missing = window.missing(context_.sequence);
  for (int peer = 0; peer < window.local_rank(); ++peer) {
    if (std::find(missing.begin(), missing.end(), peer) == missing.end()) return;  // it says so
  }
  const std::string whom =
      missing.empty() ? suspension_.wait->describe() : describe_awaited(window, missing);
  std::fprintf(stderr, "pycomm: %s has waited %s for %s. It waits until %s have passed.\n",
               describe().c_str(), seconds_text(seconds()).c_str(), whom.c_str(),
               seconds_text(operation_.timeout_s).c_str());
}

void Execution::time_out() const {
  const Window& window = context_.window;
  // Who is only behind may wait for another host, and will say for whom.
  const std::vector<int> missing = window.missing(context_.sequence);
  const bool is_behind =
      !missing.empty() && window.has_announced(missing.front(), context_.sequence);
  if (is_behind && seconds() < operation_.timeout_s + kFirstWord) return;
  if (!window.begin_inquiry() && seconds() < operation_.timeout_s + kLongestInquiry) return;
  throw CommTimeoutError(describe() + ": timeout after " + seconds_text(seconds()) +
                         ", waiting for " + suspension_.wait->describe() + "." +
                         describe_present(window, missing) + describe_missing(window, missing) +
                         "\n  " + kTimeoutRemedy);
}

void Execution::check_for_leavers() {
  if (operation_.kind == Kind::kShutdown) return;  // they are what it waits for
  const int left = context_.window.left_peer(context_.sequence);
  if (left < 0) {
    left_since_.reset();
  } else if (!left_since_) {
    left_since_ = Clock::now();
  } else if (Clock::now() - *left_since_ > kGrace) {
    throw MismatchError(describe() + ": rank " + std::to_string(left) +
                        " called shutdown() instead.\n  Every rank must make the same number of "
                        "calls; ranks with fewer batches belong in `with pycomm.join():`.");
  }
}

}  // namespace pycomm
