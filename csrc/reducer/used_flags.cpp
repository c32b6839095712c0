#include "reducer/used_flags.h"

#include <algorithm>
#include <utility>

#include "core/fork_guard.h"

namespace pycomm {

UsedFlags::UsedFlags(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets)
    : group_(std::move(group)) {
  for (const Bucket& bucket : buckets) {
    begins_.push_back(count_);
    count_ += 1 + bucket.parameters.size();
  }
  memory_ = group_->allocate(std::max<std::size_t>(count_, 1));
  for (std::size_t b = 0; b < buckets.size(); ++b) set_extent(b, Extent::kSummable);
}

UsedFlags::~UsedFlags() {
  // A peer that was only stopped may still write here when it wakes.
  if (!in_forked_child() && group_->failed()) group_->quarantine(memory_);
}

void UsedFlags::set(std::size_t bucket, const std::vector<bool>& used) {
  for (std::size_t slot = 0; slot < used.size(); ++slot) {
    *flag(bucket, slot) = std::byte{used[slot]};
  }
}

void UsedFlags::set_extent(std::size_t bucket, Extent extent) {
  memory_->data()[begins_[bucket]] = static_cast<std::byte>(extent);
}

void UsedFlags::launch(const std::string& pass) {
  Operation operation;
  operation.kind = Kind::kAllReduce;
  operation.dtype = DType::kUint8;
  operation.op = ReduceOp::kMax;
  operation.count = count_;
  operation.input = operation.output = memory_->data();
  operation.name = pass + ", which parameters were used";
  work_ = group_->start(std::move(operation));
}

void UsedFlags::wait(const InterruptCheck& check_interrupt) { work_->wait(check_interrupt); }

bool UsedFlags::get(std::size_t bucket, std::size_t slot) const {
  return *flag(bucket, slot) != std::byte{0};
}

Extent UsedFlags::extent(std::size_t bucket) const {
  return static_cast<Extent>(memory_->data()[begins_[bucket]]);
}

}  // namespace pycomm
