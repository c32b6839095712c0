#include "group/turn.h"

#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"
#include "group/backoff.h"
#include "group/group.h"
#include "group/process.h"

namespace pycomm {

std::unique_ptr<Turn> Turn::take(std::shared_ptr<Group> group) {
  if (in_forked_child() || !group->begin_turn()) return nullptr;
  return std::unique_ptr<Turn>(new Turn(std::move(group)));
}

Turn::~Turn() {
  if (in_forked_child()) return;
  execution_.reset();
  try {
    group_->end_turn();
  } catch (const CommError&) {
    // pycomm was shut down meanwhile, and has told those who had queued something.
  }
}

void Turn::start(Operation operation) {
  group_->prepare(operation);
  if (error_) return;  // wait() tells
  const auto entry = group_->journal_.queue(operation);
  operations_.push_back({std::move(operation), entry});
  group_->count_in_turn();
  advance();
}

void Turn::advance() {
  try {
    while (step()) {
    }
  } catch (...) {
    fail();
  }
}

void Turn::check() {
  try {
    if (execution_) look();
  } catch (...) {
    fail();
  }
}

bool Turn::step() {
  if (operations_.empty()) return false;
  if (!execution_) {
    execution_.emplace(group_->context_, operations_.front().operation);
    group_->journal_.start(operations_.front().entry, group_->context_);
  } else if (!execution_->advance()) {
    return false;
  }
  if (execution_->done()) {
    execution_->finish();
    execution_.reset();
    group_->journal_.end(operations_.front().entry, group_->context_, /*failed=*/false);
    operations_.pop_front();
  }
  return true;
}

void Turn::look() {
  execution_->check();
  group_->process_->roster()->check(*group_, execution_->seconds());
}

void Turn::wait(const InterruptCheck& check_interrupt) {
  Roster::Waiting waiting(group_->process_->roster().get(), group_->context_.tag);
  try {
    Backoff(group_->window_.doorbell(), group_->process_->may_spin)
        .drive([&] { return done(); }, [&] { return step(); },
               [&] {
                 waiting.slept();
                 look();
                 check_interrupt();
               });
  } catch (...) {
    fail();
  }
  if (error_) std::rethrow_exception(error_);
}

void Turn::fail() {
  error_ = group_->fail(describe_call(group_->context_, operations_.front().operation));
  group_->keep_output_of(operations_.front().operation);
  execution_.reset();
  group_->journal_.end(operations_.front().entry, group_->context_, /*failed=*/true);
  for (std::size_t i = 1; i < operations_.size(); ++i) {
    group_->journal_.end(operations_[i].entry, /*failed=*/true);
  }
  operations_.clear();
}

}  // namespace pycomm
