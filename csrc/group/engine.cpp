#include "group/engine.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "core/clock.h"
#include "core/error.h"
#include "core/fork_guard.h"
#include "group/backoff.h"

namespace pycomm {
namespace {

constexpr auto kLongestUnchecked = std::chrono::milliseconds(50);
constexpr auto kDrain = std::chrono::seconds(1);
constexpr auto kShortestDrainNap = std::chrono::milliseconds(1);

}  // namespace

Engine::Engine(ProcessPage& page, Channel* channel, Switchboard* switchboard)
    : page_(page), channel_(channel), switchboard_(switchboard), thread_([this] { run(); }) {
  started_.wait(false);  // until the LifeWord is held, a death would go unnoticed
  if (startup_error_) {
    thread_.join();
    std::rethrow_exception(startup_error_);
  }
}

Engine::~Engine() {
  if (in_forked_child()) {  // the parent has the thread
    thread_.detach();
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stopping_.store(true, std::memory_order_release);
  }
  wake_.notify_one();
  page_.doorbell.ring();
  thread_.join();
}

void Engine::submit(std::shared_ptr<Progressive> queue) {
  {
    std::lock_guard lock(mutex_);
    submitted_.push_back(std::move(queue));
    has_submitted_.store(true, std::memory_order_release);
  }
  wake_.notify_one();
  page_.doorbell.ring();
}

void Engine::wake() {
  {
    std::lock_guard lock(mutex_);
    has_news_ = true;
  }
  wake_.notify_one();
  page_.doorbell.ring();
}

Progressive::State Engine::advance_all() {
  using State = Progressive::State;
  if (has_submitted_.exchange(false, std::memory_order_acq_rel)) {
    std::lock_guard lock(mutex_);
    for (auto& queue : submitted_) {
      if (std::find(active_.begin(), active_.end(), queue) == active_.end()) {
        active_.push_back(std::move(queue));
      }
    }
    submitted_.clear();
  }
  State overall = State::kIdle;
  for (std::size_t i = 0; i < active_.size();) {
    const State state = active_[i]->advance();
    if (state == State::kIdle) {
      active_.erase(active_.begin() + static_cast<std::ptrdiff_t>(i));
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
  std::optional<LifeKeeper> alive;
  try {
    alive.emplace(page_.life);
  } catch (const CommError&) {
    startup_error_ = std::current_exception();
  }
  started_.store(true, std::memory_order_release);
  started_.notify_all();
  if (alive) drive();
}

void Engine::drive() {
  using State = Progressive::State;
  Backoff backoff(page_.doorbell);  // the thread that computes needs the core more
  auto last_check = Clock::now();
  while (!stopping_.load(std::memory_order_acquire)) {
    State state = advance_all();
    bool slept = false;
    if (active_.empty()) {
      idle();
      slept = true;
      backoff.reset();
    } else if (state == State::kAdvanced) {
      backoff.reset();
    } else {
      slept = backoff.relax(
          [&] {
            state = advance_all();
            return state == State::kAdvanced || stopping_.load(std::memory_order_acquire);
          },
          // Who waits for ranks of this host alone still has to move what MPI holds of sends that
          // are over: those ranks may wait for the one who gets it.
          [&] { return state != State::kPolling && channel_ == nullptr; });
      if (slept && channel_ != nullptr) channel_->progress();
    }
    // A busy group must not keep another one from noticing its deadline.
    if (slept || Clock::now() - last_check > kLongestUnchecked) {
      if (switchboard_ != nullptr) switchboard_->attend();  // what it hears counts at once
      for (const auto& queue : active_) queue->check();
      last_check = Clock::now();
    }
  }
  advance_all();  // takes over what was submitted last
  for (const auto& queue : active_) queue->abandon();
  if (switchboard_ != nullptr) switchboard_->leave();
}

void Engine::idle() {
  // Not at the doorbell, which rings for every blocking call of this process's own threads.
  std::unique_lock lock(mutex_);
  const auto called = [this] { return !submitted_.empty() || has_news_ || stopping_.load(); };
  const auto called_within = [&](Clock::duration nap) {
    if (!wake_.wait_for(lock, nap, called)) return false;
    has_news_ = false;  // whoever is called looks at the switchboard
    return true;
  };
  if (channel_ != nullptr) {
    // A send is over once its buffer is free; MPI may hold the last bytes until it is called again.
    // Naps grow with the time that has passed, so that a peer gets them at most a quarter later and
    // an idle rank uses no core.
    const auto began = Clock::now();
    for (Clock::duration drained{}; drained < kDrain; drained = Clock::now() - began) {
      const auto nap = std::max<Clock::duration>(kShortestDrainNap, drained / 4);
      if (called_within(nap)) return;
      lock.unlock();
      channel_->progress();
      if (switchboard_ != nullptr) switchboard_->attend();
      lock.lock();
    }
  }
  if (switchboard_ == nullptr) return wake_.wait(lock, called);
  while (!called_within(switchboard_->period())) {
    lock.unlock();
    switchboard_->attend();
    lock.lock();
  }
}

}  // namespace pycomm
