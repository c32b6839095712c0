#include "machine.h"

#include <algorithm>
#include <utility>

namespace simulation {
namespace {

constexpr nanoseconds kNever = nanoseconds::max();
/// Where nothing happens any more for so many steps, sleeps grow up to a length that the core's own
/// longest has: an hour's timeout must not take a million naps.
constexpr std::uint64_t kQuietSteps = 400;
constexpr nanoseconds kLongestSleep{50'000'000};

}  // namespace

Machine::Machine(int ranks, std::uint64_t seed, const Habits& habits)
    : random_(seed),
      habits_(habits),
      stopped_(static_cast<std::size_t>(ranks)),
      alone_(static_cast<std::size_t>(ranks), -1) {
  threads_.reserve(64);
}

Machine::~Machine() = default;

bool Machine::can_run(ThreadId id) {
  Thread& thread = threads_[index(id)];
  if (thread.fiber->done() || stopped_[index(thread.rank)]) return false;
  const ThreadId alone = alone_[index(thread.rank)];
  if (alone >= 0 && alone != id) return false;
  if (thread.ready == nullptr || thread.wake_at <= now_) return true;
  if (!(*thread.ready)()) return false;
  note_progress();
  return true;
}

Machine::ThreadId Machine::choose() {
  candidates_.clear();
  for (ThreadId id = 0; id < static_cast<ThreadId>(threads_.size()); ++id) {
    if (can_run(id)) candidates_.push_back(id);
  }
  if (candidates_.empty()) return -1;
  switch (habits_.order) {
    case Habits::Order::kUniform:
      break;
    case Habits::Order::kBursts:
      if (std::find(candidates_.begin(), candidates_.end(), last_) != candidates_.end() &&
          random_.chance(0.9)) {
        return last_;
      }
      break;
    case Habits::Order::kPriorities: {
      const auto best =
          *std::max_element(candidates_.begin(), candidates_.end(), [this](ThreadId a, ThreadId b) {
            return threads_[index(a)].priority < threads_[index(b)].priority;
          });
      if (random_.chance(0.02)) threads_[index(best)].priority = --lowest_priority_;
      return best;
    }
  }
  return candidates_[random_.below(candidates_.size())];
}

void Machine::resume(ThreadId id) {
  const auto outer_rank = std::exchange(rank_, threads_[index(id)].rank);
  const auto outer = std::exchange(running_, id);
  threads_[index(id)].ready = nullptr;
  threads_[index(id)].fiber->resume();
  running_ = outer;
  rank_ = outer_rank;
  last_ = id;
  if (threads_[index(id)].fiber->done()) note_progress();
}

void Machine::step() {
  ++steps_;
  ++quiet_;
  now_ += nanoseconds(random_.below(2 * habits_.step.count()) + 1);
  if (next_event && next_event() <= now_) do_events();
  ThreadId next = choose();
  if (next < 0) {
    nanoseconds soonest = next_event ? next_event() : kNever;
    for (const Thread& thread : threads_) {
      if (thread.fiber->done() || stopped_[index(thread.rank)]) continue;
      soonest = std::min(soonest, thread.wake_at);
    }
    if (soonest == kNever) throw Violation("hang: no thread will ever run again");
    now_ = std::max(now_, soonest);
    return;
  }
  trace_ = trace_ * 0x100000001b3 + static_cast<std::uint64_t>(next) * 1000003 +
           static_cast<std::uint64_t>(now_.count());
  resume(next);
}

void Machine::run(const std::function<bool()>& over, nanoseconds horizon) {
  while (!over()) {
    if (now_ > horizon) throw Violation("hang: still waiting at the end of time");
    step();
  }
}

pycomm::Simulation::ThreadId Machine::start(std::function<void()> body) {
  if (on_start) on_start();
  const auto id = static_cast<ThreadId>(threads_.size());
  threads_.push_back({rank_, std::make_unique<Fiber>(std::move(body)), nullptr, nanoseconds(0),
                      random_.between(1, 1000)});
  if (running_ < 0) {
    resume(id);  // up to its first wait
  } else {
    wait([this, id] { return threads_[index(id)].ready != nullptr; }, kNever);
  }
  return id;
}

void Machine::join(ThreadId thread) {
  const auto ended = [this, thread] { return threads_[index(thread)].fiber->done(); };
  if (running_ >= 0) {
    wait(ended, kNever);
  } else {
    while (!ended()) step();
  }
}

void Machine::suspend(bool alone) {
  Thread& self = threads_[index(running_)];
  if (alone) alone_[index(self.rank)] = running_;
  const int rank = self.rank;
  self.fiber->suspend();
  if (alone) alone_[index(rank)] = -1;
}

void Machine::yield() {
  if (running_ < 0) return step();
  if (at_point) at_point(rank_);
  suspend(/*alone=*/false);
}

nanoseconds Machine::stretched(nanoseconds timeout) {
  nanoseconds longest = timeout;
  if (habits_.oversleep > 0 && random_.chance(habits_.oversleep)) {
    longest += nanoseconds(random_.below(std::min(timeout, kLongestSleep).count() + 1));
  }
  if (quiet_ > kQuietSteps && timeout < kLongestSleep) {
    const auto doublings = std::min<std::uint64_t>(10, (quiet_ - kQuietSteps) / 50);
    longest = std::min(std::max(longest, timeout * (1 << doublings)), kLongestSleep);
  }
  return longest;
}

bool Machine::wait(const std::function<bool()>& ready, nanoseconds timeout) {
  if (running_ < 0) {  // from outside, the machine goes on meanwhile
    const nanoseconds until = timeout == kNever ? kNever : now_ + timeout;
    while (!ready() && now_ < until) step();
    return ready();
  }
  if (at_point) at_point(rank_);
  Thread& self = threads_[index(running_)];
  self.wake_at = timeout == kNever ? kNever : now_ + stretched(timeout);
  self.ready = &ready;
  suspend(/*alone=*/false);
  return ready();
}

void Machine::interleave() {
  if (running_ < 0) return;
  if (at_point) at_point(rank_);
  if (stopped_[index(rank_)] || random_.chance(habits_.interleave)) suspend(/*alone=*/true);
}

}  // namespace simulation
