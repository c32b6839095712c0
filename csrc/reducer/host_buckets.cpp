#include "reducer/host_buckets.h"

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

}  // namespace

HostBuckets::HostBuckets(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets,
                         const std::vector<std::size_t>& counts,
                         std::optional<BucketExchange> exchange)
    : group_(std::move(group)),
      buckets_(buckets),
      counts_(counts),
      exchange_(std::move(exchange)),
      state_(buckets.size()) {
  if (exchange_) flags_.emplace(group_, buckets_);
  std::size_t bytes = 0;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    state_[b].memory = group_->allocate(bucket.count * size_of(bucket.dtype));
    bytes += bucket.count * size_of(bucket.dtype);
    for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
      write_flag(element(b, bucket.flags_offset + slot), bucket.dtype, false);
    }
  }
  fits_caches_ = bytes <= kCachedBytes;
}

HostBuckets::~HostBuckets() {
  if (in_forked_child() || !group_->failed()) return;
  // A peer that was only stopped may still fold into the buckets when it wakes.
  for (State& bucket : state_) group_->quarantine(bucket.memory);
}

std::byte* HostBuckets::element(std::size_t bucket, std::size_t offset) const {
  return state_[bucket].memory->data() + offset * size_of(buckets_[bucket].dtype);
}

std::size_t HostBuckets::bytes_of(std::size_t bucket, std::size_t slot) const {
  return counts_[buckets_[bucket].parameters[slot]] * size_of(buckets_[bucket].dtype);
}

void HostBuckets::fill(std::size_t bucket, std::size_t slot, const std::byte* gradient,
                       StreamAddress) {
  const std::size_t bytes = bytes_of(bucket, slot);
  if (gradient == nullptr || bytes == 0) return;  // an empty gradient lies nowhere
  std::byte* const place = element(bucket, buckets_[bucket].offsets[slot]);
  if (fits_caches_) {
    std::memcpy(place, gradient, bytes);
  } else {
    copy_past_caches(place, gradient, bytes);
  }
}

void HostBuckets::launch(std::size_t b, const Contribution& contribution, Operation operation,
                         StreamAddress) {
  const Bucket& bucket = buckets_[b];
  for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
    if (!contribution.present[slot]) {
      std::memset(element(b, bucket.offsets[slot]), 0, bytes_of(b, slot));
    }
    write_flag(element(b, bucket.flags_offset + slot), bucket.dtype, contribution.used[slot]);
  }
  operation.input = operation.output = state_[b].memory->data();
  if (exchange_) {
    flags_->set(b, contribution.used);
    operation.count = bucket.flags_offset;
    state_[b].work = exchange_->launch(b, operation);
    return;
  }
  operation.count = bucket.count;
  if (b == 0) turn_ = Turn::take(group_);
  if (turn_) {
    turn_->start(std::move(operation));
  } else {
    state_[b].work = group_->start(std::move(operation));
  }
}

void HostBuckets::finish(const std::string& pass) {
  if (flags_) flags_->launch(pass);
}

void HostBuckets::advance() {
  if (turn_) turn_->advance();
}

void HostBuckets::wait(const InterruptCheck& check_interrupt, StreamAddress) {
  if (turn_) {
    turn_->wait(check_interrupt);
    turn_.reset();
  } else {
    for (std::size_t b = 0; b < state_.size(); ++b) {
      if (state_[b].work) {
        state_[b].work->wait(check_interrupt);
        if (exchange_) exchange_->finish(b);
      }
      state_[b].work.reset();
    }
    if (flags_) flags_->wait(check_interrupt);
  }
}

bool HostBuckets::used(std::size_t bucket, std::size_t slot) const {
  if (flags_) return flags_->get(bucket, slot);
  // A sum of ones and zeros, or its quotient, is zero only if all were: no dtype underflows at
  // world sizes below 2^23. Compare bytes, so that no 16-bit arithmetic is needed.
  const std::byte* const flag = element(bucket, buckets_[bucket].flags_offset + slot);
  return std::any_of(flag, flag + size_of(buckets_[bucket].dtype),
                     [](std::byte byte) { return byte != std::byte{0}; });
}

bool HostBuckets::in_flight() const {
  if (turn_ && !turn_->done()) return true;
  if (flags_ && flags_->work() && !flags_->work()->done()) return true;
  return std::any_of(state_.begin(), state_.end(),
                     [](const State& bucket) { return bucket.work && !bucket.work->done(); });
}

void HostBuckets::give_up() {
  turn_.reset();
  for (State& bucket : state_) {
    if (bucket.work) wait_out(*bucket.work);
  }
  if (flags_ && flags_->work()) wait_out(*flags_->work());
}

}  // namespace pycomm
