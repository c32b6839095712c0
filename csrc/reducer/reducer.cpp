#include "reducer/reducer.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"

namespace pycomm {
namespace {

/// "bucket 3 (conv.weight, conv.bias, ... 9 parameters)", short enough to travel in messages.
std::string describe(std::size_t index, const Bucket& bucket,
                     const std::vector<Reducer::Parameter>& parameters) {
  constexpr std::size_t kNamed = 3;
  std::string text = "bucket " + std::to_string(index) + " (";
  for (std::size_t i = 0; i < std::min(kNamed, bucket.parameters.size()); ++i) {
    if (i > 0) text += ", ";
    text += parameters[bucket.parameters[i]].name;
  }
  if (bucket.parameters.size() > kNamed) {
    text += ", ... " + std::to_string(bucket.parameters.size()) + " parameters";
  }
  return text + ")";
}

}  // namespace

Reducer::Reducer(std::shared_ptr<Group> group, std::vector<Parameter> parameters,
                 std::vector<Bucket> buckets, std::shared_ptr<BucketStore> store, bool overlap,
                 Algorithm algorithm)
    : group_(std::move(group)),
      parameters_(std::move(parameters)),
      buckets_(std::move(buckets)),
      fired_(parameters_.size()),
      state_(buckets_.size()),
      store_(std::move(store)),
      overlap_(overlap),
      algorithm_(algorithm) {
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    state_[b].description = describe(b, bucket, parameters_);
    for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
      fired_[bucket.parameters[slot]].bucket = b;
      fired_[bucket.parameters[slot]].slot = slot;
    }
  }
  for (Parameter& parameter : parameters_) {
    parameter.expected_firings = std::max<std::uint32_t>(parameter.expected_firings, 1);
  }
}

Reducer::~Reducer() {
  if (in_forked_child() || !store_->in_flight()) return;  // nothing here is the child's
  // The memory must outlive the operations, and the abort ends them at once.
  try {
    group_->abort("gradients were dropped while they were being reduced (" +
                  (launched_ > 0 ? state_[launched_ - 1].description : pass()) + ")");
  } catch (const CommError&) {
    // Finished already: its operations are over, or about to be.
  }
  store_->give_up();
}

void Reducer::begin(ReduceOp op, std::int64_t divisor, std::int64_t label) {
  if (open_ && launched_ > 0) {
    fail("the backward pass before this one was ended by an exception after " +
         std::to_string(launched_) + " of " + std::to_string(buckets_.size()) +
         " buckets had been launched, so ranks can no longer agree on what they reduce. Load a "
         "checkpoint and start again.");
  }
  reset();
  store_->begin();
  op_ = op;
  divisor_ = divisor;
  label_ = label;
  open_ = true;
}

void Reducer::reset() {
  launched_ = 0;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    state_[b].missing = buckets_[b].parameters.size();
  }
  for (ParameterState& fired : fired_) {
    fired.firings = 0;
    fired.held = false;
  }
}

void Reducer::fill(std::size_t parameter, const std::byte* gradient, StreamAddress stream) {
  const ParameterState& fired = fired_.at(parameter);
  store_->fill(fired.bucket, fired.slot, gradient, stream);
}

void Reducer::ready(std::size_t parameter, StreamAddress stream) {
  ParameterState& fired = fired_.at(parameter);
  ++fired.firings;
  if (fired.bucket < launched_) {
    fail("the gradient of '" + parameters_[parameter].name + "' became final " +
         std::to_string(fired.firings) + " times in one backward pass, where it was expected " +
         std::to_string(parameters_[parameter].expected_firings) +
         " times, and its bucket is already being reduced. A graph that differs from pass to pass "
         "(a weight used in several re-entrant checkpoints, say) needs "
         "DistributedOptimizer(..., overlap=False).");
  }
  if (fired.firings == parameters_[parameter].expected_firings) --state_[fired.bucket].missing;
  if (!overlap_) return;
  store_->advance();
  while (launched_ < buckets_.size() && state_[launched_].missing == 0) launch_next(stream);
}

void Reducer::hold(std::size_t parameter) { fired_.at(parameter).held = true; }

std::vector<std::size_t> Reducer::unfired() const {
  std::vector<std::size_t> parameters;
  for (std::size_t i = 0; i < fired_.size(); ++i) {
    if (fired_[i].firings == 0) parameters.push_back(i);
  }
  return parameters;
}

void Reducer::launch_next(StreamAddress stream) {
  const std::size_t b = launched_;
  const Bucket& bucket = buckets_[b];
  Contribution contribution;
  for (const std::size_t parameter : bucket.parameters) {
    const ParameterState& fired = fired_[parameter];
    contribution.present.push_back(fired.firings > 0 || fired.held);
    contribution.used.push_back(fired.firings > 0);
  }
  Operation operation;
  operation.kind = Kind::kAllReduce;
  operation.dtype = bucket.dtype;
  operation.op = op_;
  operation.algorithm = algorithm_;
  operation.divisor = divisor_;
  operation.name = pass() + ", " + state_[b].description;
  store_->launch(b, contribution, std::move(operation), stream);
  ++launched_;
}

std::string Reducer::pass() const { return "backward " + std::to_string(label_) + " of its step"; }

void Reducer::finish(StreamAddress stream) {
  while (launched_ < buckets_.size()) launch_next(stream);
  store_->finish(pass());
  for (std::size_t i = 0; i < fired_.size(); ++i) {
    parameters_[i].expected_firings = std::max(parameters_[i].expected_firings, fired_[i].firings);
  }
}

void Reducer::wait(const InterruptCheck& check_interrupt, StreamAddress stream) {
  store_->wait(check_interrupt, stream);
  open_ = false;
}

bool Reducer::used(std::size_t parameter) const {
  const ParameterState& fired = fired_.at(parameter);
  return store_->used(fired.bucket, fired.slot);
}

void Reducer::fail(const std::string& reason) {
  const std::string text = "rank " + std::to_string(group_->rank()) + ": " + reason;
  group_->abort(text);
  throw CommError(text);
}

}  // namespace pycomm
