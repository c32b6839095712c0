#include "group/engine.h"

#include <algorithm>
#include <utility>

#include "core/fork_guard.h"
#include "group/backoff.h"

namespace pycomm {

Engine::Engine(ProcessPage& page) : page_(page), thread_([this] { run(); }) {
  started_.wait(false);  // until the LifeWord is held, a death would go unnoticed
}

Engine::~Engine() {
  if (in_forked_child()) {  // the parent has the thread
    thread_.detach();
    return;
  }
  stopping_.store(true, std::memory_order_release);
  page_.doorbell.ring();
  thread_.join();
}

void Engine::submit(std::shared_ptr<Progressive> queue) {
  {
    std::lock_guard lock(mutex_);
    submitted_.push_back(std::move(queue));
  }
  has_submitted_.store(true, std::memory_order_release);
  page_.doorbell.ring();
}

Progressive::State Engine::advance_all(std::vector<std::shared_ptr<Progressive>>& active) {
  using State = Progressive::State;
  if (has_submitted_.exchange(false, std::memory_order_acq_rel)) {
    std::lock_guard lock(mutex_);
    for (auto& queue : submitted_) {
      if (std::find(active.begin(), active.end(), queue) == active.end()) {
        active.push_back(std::move(queue));
      }
    }
    submitted_.clear();
  }
  State overall = State::kIdle;
  for (std::size_t i = 0; i < active.size();) {
    const State state = active[i]->advance();
    if (state == State::kIdle) {
      active.erase(active.begin() + static_cast<std::ptrdiff_t>(i));
      continue;
    }
    ++i;
    if (state == State::kAdvanced || overall == State::kAdvanced) {
      overall = State::kAdvanced;
    } else {
      overall = std::max(overall, state);
    }
  }
  return overall;
}

void Engine::run() {
  using State = Progressive::State;
  const LifeKeeper alive(page_.life);
  started_.store(true, std::memory_order_release);
  started_.notify_all();
  // Never spin: the thread that computes needs the core more.
  Backoff backoff(page_.doorbell, /*may_spin=*/false);
  std::vector<std::shared_ptr<Progressive>> active;
  while (!stopping_.load(std::memory_order_acquire)) {
    State state = advance_all(active);
    if (state == State::kAdvanced) {
      backoff.reset();
      continue;
    }
    const auto look_again = [&] {
      state = advance_all(active);
      return state == State::kAdvanced || stopping_.load(std::memory_order_acquire);
    };
    if (backoff.relax(look_again, state != State::kPolling)) {
      for (const auto& queue : active) queue->check();
    }
  }
  advance_all(active);  // takes over what was submitted last
  for (const auto& queue : active) queue->abandon();
}

}  // namespace pycomm
