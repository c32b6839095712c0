#include "reducer/host_buckets.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"
#include "kernels/copy.h"
#include "kernels/extent.h"

namespace pycomm {
namespace {

/// Gradients of which no more are still in a core's second-level cache when they are folded.
constexpr std::size_t kCachedBytes = 1 << 20;

enum class Flag { kZero, kOne, kNan };

/// Write a number as an element of a floating dtype.
void write_flag(std::byte* element, DType dtype, Flag flag) {
  const auto put = [&](auto one, auto nan) {
    const decltype(one) value = flag == Flag::kOne   ? one
                                : flag == Flag::kNan ? nan
                                                     : decltype(one){};
    std::memcpy(element, &value, sizeof value);
  };
  switch (dtype) {
    case DType::kFloat16:
      return put(std::uint16_t{0x3C00}, std::uint16_t{0x7E00});
    case DType::kBFloat16:
      return put(std::uint16_t{0x3F80}, std::uint16_t{0x7FC0});
    case DType::kFloat32:
      return put(1.0f, std::numeric_limits<float>::quiet_NaN());
    case DType::kFloat64:
      return put(1.0, std::numeric_limits<double>::quiet_NaN());
    default:
      throw InvalidArgumentError(std::string("a bucket of ") + name_of(dtype) +
                                 ": gradients are float16, bfloat16, float32 or float64.");
  }
}

Flag flag_of(bool used) { return used ? Flag::kOne : Flag::kZero; }

Flag flag_of(Extent extent) {
  switch (extent) {
    case Extent::kSummable:
      return Flag::kZero;
    case Extent::kLarge:
      return Flag::kOne;
    case Extent::kNonFinite:
      break;
  }
  return Flag::kNan;
}

/// Whether the sum of some flags, or its quotient, is that of zeros. No dtype underflows at world
/// sizes below 2^23. Compare bytes, so that no 16-bit arithmetic is needed.
bool is_zero(const std::byte* flag, DType dtype) {
  return std::all_of(flag, flag + size_of(dtype),
                     [](std::byte byte) { return byte == std::byte{0}; });
}

}  // namespace

HostBuckets::HostBuckets(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets,
                         const std::vector<std::size_t>& counts,
                         std::optional<BucketExchange> exchange, bool measures)
    : group_(std::move(group)),
      buckets_(buckets),
      counts_(counts),
      exchange_(std::move(exchange)),
      measures_(measures),
      state_(buckets.size()) {
  if (exchange_) flags_.emplace(group_, buckets_);
  std::size_t bytes = 0;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    state_[b].memory = group_->allocate((bucket.count + measures_) * size_of(bucket.dtype));
    bytes += bucket.count * size_of(bucket.dtype);
    for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
      write_flag(element(b, bucket.flags_offset + slot), bucket.dtype, Flag::kZero);
    }
    state_[b].brought.resize(bucket.parameters.size());
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

void HostBuckets::begin() {
  if (!measures_) return;
  for (State& bucket : state_)
    std::fill(bucket.brought.begin(), bucket.brought.end(), std::nullopt);
}

void HostBuckets::fill(std::size_t bucket, std::size_t slot, const std::byte* gradient,
                       StreamAddress) {
  const std::size_t bytes = bytes_of(bucket, slot);
  const std::size_t offset = buckets_[bucket].offsets[slot];
  std::byte* const place = element(bucket, offset);
  if (bytes == 0) return;  // an empty gradient lies nowhere
  if (measures_) {
    const DType dtype = buckets_[bucket].dtype;
    state_[bucket].brought[slot] =
        gradient == nullptr ? extent_at(bucket, offset, bytes)
                            : extent_of(copy_measured(dtype, place, gradient, bytes, !fits_caches_),
                                        dtype, static_cast<std::size_t>(group_->size()));
    return;
  }
  if (gradient == nullptr) return;
  if (fits_caches_) {
    std::memcpy(place, gradient, bytes);
  } else {
    copy_past_caches(place, gradient, bytes);
  }
}

void HostBuckets::launch(std::size_t b, const Contribution& contribution, Operation operation,
                         StreamAddress) {
  const Bucket& bucket = buckets_[b];
  Extent extent = Extent::kSummable;
  for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
    std::optional<Extent>& brought = state_[b].brought[slot];
    std::byte* const gradient = element(b, bucket.offsets[slot]);
    std::byte* const padding = gradient + bytes_of(b, slot);
    if (exchange_) {  // the last one may have written anything there
      std::fill(padding, element(b, bucket.end_of(slot)), std::byte{0});
    }
    if (!contribution.present[slot]) {
      std::fill(gradient, padding, std::byte{0});
      brought = Extent::kSummable;
    }
    if (measures_) {
      if (!brought) brought = extent_at(b, bucket.offsets[slot], bytes_of(b, slot));
      extent = std::max(extent, *brought);
    }
    write_flag(element(b, bucket.flags_offset + slot), bucket.dtype,
               flag_of(bool{contribution.used[slot]}));
  }
  operation.input = operation.output = state_[b].memory->data();
  if (exchange_) {
    flags_->set(b, contribution.used);
    flags_->set_extent(b, extent);
    operation.count = bucket.flags_offset;
    state_[b].work = exchange_->launch(b, operation);
    return;
  }
  operation.count = bucket.count + measures_;
  if (measures_) write_flag(element(b, bucket.count), bucket.dtype, flag_of(extent));
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
  return !is_zero(element(bucket, buckets_[bucket].flags_offset + slot), buckets_[bucket].dtype);
}

Extent HostBuckets::extent_at(std::size_t bucket, std::size_t offset, std::size_t bytes) const {
  const DType dtype = buckets_[bucket].dtype;
  return extent_of(largest_magnitude(dtype, element(bucket, offset), bytes), dtype,
                   static_cast<std::size_t>(group_->size()));
}

Extent HostBuckets::agreed(std::size_t b) const {
  const Bucket& bucket = buckets_[b];
  const std::size_t element_bytes = size_of(bucket.dtype);
  if (exchange_) {
    const bool is_finite =
        extent_at(b, 0, bucket.flags_offset * element_bytes) != Extent::kNonFinite;
    return std::max(flags_->extent(b), is_finite ? Extent::kSummable : Extent::kLarge);
  }
  if (is_zero(element(b, bucket.count), bucket.dtype)) return Extent::kSummable;
  const Extent extent = extent_at(b, bucket.count, element_bytes);
  return extent == Extent::kNonFinite ? extent : Extent::kLarge;
}

Extent HostBuckets::worst() const {
  Extent worst = Extent::kSummable;
  for (std::size_t b = 0; b < buckets_.size(); ++b) worst = std::max(worst, agreed(b));
  return worst;
}

std::vector<Extent> HostBuckets::brought() const {
  std::vector<Extent> extents(counts_.size(), Extent::kSummable);
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    for (std::size_t slot = 0; slot < buckets_[b].parameters.size(); ++slot) {
      extents[buckets_[b].parameters[slot]] = state_[b].brought[slot].value_or(Extent::kSummable);
    }
  }
  return extents;
}

Extent HostBuckets::extent(std::size_t parameter) const {
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const auto& parameters = buckets_[b].parameters;
    const auto found = std::find(parameters.begin(), parameters.end(), parameter);
    if (found == parameters.end()) continue;
    const auto slot = static_cast<std::size_t>(found - parameters.begin());
    return extent_at(b, buckets_[b].offsets[slot], bytes_of(b, slot));
  }
  throw InvalidArgumentError("no bucket has parameter " + std::to_string(parameter) + ".");
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
