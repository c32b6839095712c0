#include "reducer/reducer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"
#include "kernels/copy.h"

namespace pycomm {
namespace {

/// Gradients of which no more are still in a core's second-level cache when they are folded.
constexpr std::size_t kCachedBytes = 1 << 20;

/// Write 1 or 0 as an element of a floating dtype.
void write_flag(std::byte* element, DType dtype, bool used) {
  const auto put = [&](auto one) {
    const decltype(one) value = used ? one : decltype(one){};
    std::memcpy(element, &value, sizeof value);
  };
  switch (dtype) {
    case DType::kFloat16:
      return put(std::uint16_t{0x3C00});
    case DType::kBFloat16:
      return put(std::uint16_t{0x3F80});
    case DType::kFloat32:
      return put(1.0f);
    case DType::kFloat64:
      return put(1.0);
    default:
      throw InvalidArgumentError(std::string("a bucket of ") + name_of(dtype) +
                                 ": gradients are float16, bfloat16, float32 or float64.");
  }
}

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
                 std::vector<Bucket> buckets, bool overlap)
    : group_(std::move(group)),
      parameters_(std::move(parameters)),
      buckets_(std::move(buckets)),
      fired_(parameters_.size()),
      state_(buckets_.size()),
      overlap_(overlap) {
  std::size_t bytes = 0;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    state_[b].memory = group_->allocate(bucket.count * size_of(bucket.dtype));
    bytes += bucket.count * size_of(bucket.dtype);
    state_[b].description = describe(b, bucket, parameters_);
    for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
      fired_[bucket.parameters[slot]].bucket = b;
      fired_[bucket.parameters[slot]].slot = slot;
      write_flag(element(b, bucket.flags_offset + slot), bucket.dtype, false);
    }
  }
  fits_caches_ = bytes <= kCachedBytes;
  for (Parameter& parameter : parameters_) {
    parameter.expected_firings = std::max<std::uint32_t>(parameter.expected_firings, 1);
  }
}

Reducer::~Reducer() {
  if (in_forked_child()) return;  // nothing here is the child's
  if (in_flight()) {
    // The memory must outlive the operations, and the abort ends them at once.
    try {
      group_->abort("gradients were dropped while they were being reduced (" +
                    state_[launched_ - 1].description + ")");
    } catch (const CommError&) {
      // Finished already: its operations are over, or about to be.
    }
    turn_.reset();
    for (BucketState& bucket : state_) {
      if (!bucket.work) continue;
      try {
        bucket.work->wait([] {});
      } catch (const CommError&) {
        // Whoever dropped the reducer does not ask how its operations ended.
      }
    }
  }
  if (group_->failed()) {
    // A peer that was only stopped may still fold into the buckets when it wakes.
    for (BucketState& bucket : state_) group_->quarantine(bucket.memory);
  }
}

bool Reducer::in_flight() const {
  if (turn_ && !turn_->done()) return true;
  return std::any_of(state_.begin(), state_.end(),
                     [](const BucketState& bucket) { return bucket.work && !bucket.work->done(); });
}

std::byte* Reducer::element(std::size_t bucket, std::size_t offset) const {
  return state_[bucket].memory->data() + offset * size_of(buckets_[bucket].dtype);
}

void Reducer::begin(ReduceOp op, std::int64_t divisor, std::int64_t label) {
  if (open_ && launched_ > 0) {
    fail("the backward pass before this one was ended by an exception after " +
         std::to_string(launched_) + " of " + std::to_string(buckets_.size()) +
         " buckets had been launched, so ranks can no longer agree on what they reduce. Load a "
         "checkpoint and start again.");
  }
  reset();
  op_ = op;
  divisor_ = divisor;
  label_ = label;
  open_ = true;
}

void Reducer::reset() {
  launched_ = 0;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    state_[b].work.reset();
    state_[b].missing = buckets_[b].parameters.size();
  }
  for (ParameterState& fired : fired_) {
    fired.firings = 0;
    fired.held = false;
  }
}

void Reducer::fill(std::size_t parameter, const std::byte* gradient) {
  const ParameterState& fired = fired_.at(parameter);
  const Bucket& bucket = buckets_[fired.bucket];
  std::byte* const place = element(fired.bucket, bucket.offsets[fired.slot]);
  const std::size_t bytes = parameters_[parameter].spec.count * size_of(bucket.dtype);
  if (bytes == 0) return;  // an empty gradient lies nowhere
  if (fits_caches_) {
    std::memcpy(place, gradient, bytes);
  } else {
    copy_past_caches(place, gradient, bytes);
  }
}

void Reducer::ready(std::size_t parameter) {
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
  if (turn_) turn_->advance();
  while (launched_ < buckets_.size() && state_[launched_].missing == 0) launch_next();
}

void Reducer::hold(std::size_t parameter) { fired_.at(parameter).held = true; }

std::vector<std::size_t> Reducer::unfired() const {
  std::vector<std::size_t> parameters;
  for (std::size_t i = 0; i < fired_.size(); ++i) {
    if (fired_[i].firings == 0) parameters.push_back(i);
  }
  return parameters;
}

void Reducer::launch_next() {
  const std::size_t b = launched_;
  const Bucket& bucket = buckets_[b];
  for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
    const std::size_t parameter = bucket.parameters[slot];
    const ParameterState& fired = fired_[parameter];
    if (fired.firings == 0 && !fired.held) {
      std::memset(element(b, bucket.offsets[slot]), 0,
                  parameters_[parameter].spec.count * size_of(bucket.dtype));
    }
    write_flag(element(b, bucket.flags_offset + slot), bucket.dtype, fired.firings > 0);
  }
  Operation operation;
  operation.kind = Kind::kAllReduce;
  operation.dtype = bucket.dtype;
  operation.op = op_;
  operation.divisor = divisor_;
  operation.count = bucket.count;
  operation.input = operation.output = state_[b].memory->data();
  operation.name = "backward " + std::to_string(label_) + " of its step, " + state_[b].description;
  if (b == 0) turn_ = Turn::take(group_);
  if (turn_) {
    turn_->start(std::move(operation));
  } else {
    state_[b].work = group_->start(std::move(operation));
  }
  ++launched_;
}

void Reducer::finish() {
  while (launched_ < buckets_.size()) launch_next();
  for (std::size_t i = 0; i < fired_.size(); ++i) {
    parameters_[i].expected_firings = std::max(parameters_[i].expected_firings, fired_[i].firings);
  }
}

void Reducer::wait(const InterruptCheck& check_interrupt) {
  if (turn_) {
    turn_->wait(check_interrupt);
    turn_.reset();
  } else {
    for (BucketState& bucket : state_) bucket.work->wait(check_interrupt);
  }
  open_ = false;
}

bool Reducer::used(std::size_t parameter) const {
  const ParameterState& fired = fired_.at(parameter);
  const Bucket& bucket = buckets_[fired.bucket];
  // A sum of ones and zeros, or its quotient, is zero only if all were: no dtype underflows at
  // world sizes below 2^23. Compare bytes, so that no 16-bit arithmetic is needed.
  const std::byte* flag = element(fired.bucket, bucket.flags_offset + fired.slot);
  return std::any_of(flag, flag + size_of(bucket.dtype),
                     [](std::byte byte) { return byte != std::byte{0}; });
}

void Reducer::fail(const std::string& reason) {
  const std::string text = "rank " + std::to_string(group_->rank()) + ": " + reason;
  group_->abort(text);
  throw CommError(text);
}

}  // namespace pycomm
