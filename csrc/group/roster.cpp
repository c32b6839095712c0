#include "group/roster.h"

#include <algorithm>

#include "core/error.h"
#include "core/simulation.h"

namespace pycomm {
namespace {

/// Who waits for an operation that has ended is still there for a moment. After this long it waits
/// for the one that is under way, or for one behind it.
constexpr auto kWakesWithin = std::chrono::milliseconds(250);

}  // namespace

std::uint32_t thread_number() {
  if (const auto* const simulation = Simulation::current()) {
    return static_cast<std::uint32_t>(simulation->running()) + 1;
  }
  static std::atomic<std::uint32_t> threads{0};
  thread_local std::uint32_t mine = 0;  // not initialised at run time, which every call would check
  if (mine == 0) mine = threads.fetch_add(1, std::memory_order_relaxed) + 1;
  return mine;
}

Roster::Roster(int rank, std::vector<int> local_ranks, std::vector<ProcessPage*> pages)
    : rank_(rank),
      local_ranks_(std::move(local_ranks)),
      local_rank_(static_cast<int>(std::find(local_ranks_.begin(), local_ranks_.end(), rank) -
                                   local_ranks_.begin())),
      pages_(std::move(pages)) {}

void Roster::enrol(Enrolled& group) {
  std::lock_guard lock(mutex_);
  groups_.push_back(&group);
}

void Roster::strike(const Enrolled& group) {
  std::lock_guard lock(mutex_);
  std::erase(groups_, &group);
  std::erase_if(stuck_, [&](const Stuck& stuck) { return stuck.tag == group.tag(); });
}

void Roster::add(Waiting& waiting) {
  waiting.thread_ = thread_number();
  waiting.since_ = Clock::now();
  std::lock_guard lock(mutex_);
  waiting_.push_back(&waiting);
}

void Roster::remove(const Waiting& waiting) {
  std::lock_guard lock(mutex_);
  std::erase(waiting_, &waiting);
  if (shows_calls_) show();  // that it goes on
}

void Roster::check(const Enrolled& group, double seconds) {
  if (seconds < std::chrono::duration<double>(kSettled).count()) return;
  std::lock_guard lock(mutex_);
  note_call(group);
  if (auto told = pages_[static_cast<std::size_t>(local_rank_)]->verdict.take()) {
    found_ = Fault{std::move(told->text), {{rank_, told->tag}}};
  } else if (Clock::now() - last_look_ >= kBetweenLooks) {
    look();
  }
  if (!found_) return;
  for (const Fault::Concerned& concerned : found_->concerned) {
    if (concerned.rank == rank_ && concerned.tag == group.tag()) {
      tell_concerned(*std::exchange(found_, std::nullopt));
    }
  }
}

void Roster::tell_concerned(const Fault& fault) {
  for (const Fault::Concerned& concerned : fault.concerned) {
    const auto peer = std::find(local_ranks_.begin(), local_ranks_.end(), concerned.rank);
    if (concerned.rank == rank_ || peer == local_ranks_.end()) continue;
    ProcessPage& page = *pages_[static_cast<std::size_t>(peer - local_ranks_.begin())];
    if (page.verdict.post(concerned.tag, fault.text)) page.doorbell.ring();
  }
  throw MismatchError(fault.text);
}

void Roster::note_call(const Enrolled& group) {
  const auto known = std::find_if(stuck_.begin(), stuck_.end(),
                                  [&](const Stuck& stuck) { return stuck.tag == group.tag(); });
  Stuck& stuck = known == stuck_.end() ? stuck_.emplace_back() : *known;
  stuck = {group.tag(), Clock::now(), group.current_call()};
}

void Roster::show() {
  // A driver looks at least every 50 ms; what it no longer tells of is over.
  std::erase_if(stuck_, [](const Stuck& stuck) {
    return Clock::now() - stuck.noted > kBetweenLooks + kBetweenLooks;
  });
  Standing standing;
  standing.rank = rank_;
  for (const Waiting* const waiting : waiting_) {
    if (Clock::now() - waiting->since_ < kWakesWithin) continue;
    const auto stuck = std::find_if(stuck_.begin(), stuck_.end(),
                                    [&](const Stuck& entry) { return entry.tag == waiting->tag_; });
    if (stuck == stuck_.end() || standing.call_count == Standing::kMostCalls) continue;
    auto& call = standing.calls[static_cast<std::size_t>(standing.call_count++)];
    call = stuck->call;
    call.thread = waiting->thread_;
  }
  shows_calls_ = standing.call_count > 0;
  for (const Enrolled* const group : groups_) {
    if (!shows_calls_ || standing.group_count == Standing::kMostGroups) break;
    standing.groups[static_cast<std::size_t>(standing.group_count++)] = group->use();
  }
  pages_[static_cast<std::size_t>(local_rank_)]->standing.show(standing);
}

void Roster::look() {
  last_look_ = Clock::now();
  show();
  std::vector<Standing> standings;
  for (const ProcessPage* const page : pages_) {
    if (const auto standing = page->standing.read()) standings.push_back(*standing);
  }
  auto fault = find_fault(standings);
  const bool again = fault && suspected_ && fault->text == suspected_->text;
  found_ = again ? fault : std::nullopt;
  suspected_ = std::move(fault);
}

}  // namespace pycomm
