#include "reducer/gpu_buckets.h"

#include <algorithm>
#include <utility>

#include "kernels/cuda/kernels.h"

namespace pycomm {

GpuBuckets::GpuBuckets(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets,
                       const std::vector<std::size_t>& counts, int device, StreamAddress stream,
                       const InterruptCheck& check_interrupt,
                       std::optional<BucketExchange> exchange)
    : group_(std::move(group)),
      buckets_(buckets),
      counts_(counts),
      device_(device),
      exchange_(std::move(exchange)),
      read_on_(stream),
      state_(buckets.size()),
      flags_(group_, buckets) {
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    state_[b].memory = group_->allocate_on_device(bucket.count * size_of(bucket.dtype), device_,
                                                  stream, check_interrupt);
    state_[b].gradients.resize(bucket.parameters.size());
  }
}

void GpuBuckets::begin() {
  for (State& state : state_) forget_gradients(state);
}

void GpuBuckets::forget_gradients(State& state) {
  std::fill(state.gradients.begin(), state.gradients.end(), nullptr);
  state.streams.clear();
}

void GpuBuckets::fill(std::size_t bucket, std::size_t slot, const std::byte* gradient,
                      StreamAddress stream) {
  state_[bucket].gradients[slot] = gradient;
  note(state_[bucket], stream);
}

void GpuBuckets::note(State& state, StreamAddress stream) {
  if (std::find(state.streams.begin(), state.streams.end(), stream) == state.streams.end()) {
    state.streams.push_back(stream);
  }
}

void GpuBuckets::launch(std::size_t b, const Contribution& contribution, Operation operation,
                        StreamAddress stream) {
  const Bucket& bucket = buckets_[b];
  State& state = state_[b];
  nccl::Plane& gpu = group_->gpu_plane();
  note(state, read_on_);
  for (const StreamAddress before : state.streams) {
    if (before != stream) gpu.order(before, stream);
  }
  flags_.set(b, contribution.used);
  std::vector<cuda::Segment> segments;
  for (std::size_t slot = 0; slot < bucket.parameters.size(); ++slot) {
    const std::byte* const gradient = contribution.present[slot] ? state.gradients[slot] : nullptr;
    const std::size_t padding = bucket.offsets[slot] + counts_[bucket.parameters[slot]];
    if (exchange_ &&
        padding < bucket.end_of(slot)) {  // the last one may have written anything there
      segments.push_back({nullptr, state.memory->data() + padding * size_of(bucket.dtype),
                          bucket.end_of(slot) - padding});
    }
    if (gradient == nullptr && contribution.present[slot]) continue;  // it lies there
    segments.push_back({gradient,
                        state.memory->data() + bucket.offsets[slot] * size_of(bucket.dtype),
                        counts_[bucket.parameters[slot]]});
  }
  gpu.copy(bucket.dtype, segments, stream);
  forget_gradients(state);
  operation.count = bucket.flags_offset;  // the flags go their own way
  operation.input = operation.output = state.memory->data();
  operation.device = device_;
  operation.stream = stream;
  state.work = exchange_ ? exchange_->launch(b, operation) : group_->start(std::move(operation));
}

void GpuBuckets::finish(const std::string& pass) { flags_.launch(pass); }

void GpuBuckets::wait(const InterruptCheck& check_interrupt, StreamAddress stream) {
  for (const State& bucket : state_) bucket.work->wait(check_interrupt);
  flags_.wait(check_interrupt);
  read_on_ = stream;
  // The last is behind all others on the GPU.
  if (!state_.empty()) state_.back().work->device_call()->order_before(stream);
  if (exchange_) {
    for (std::size_t b = 0; b < state_.size(); ++b) exchange_->finish(b);
  }
}

bool GpuBuckets::used(std::size_t bucket, std::size_t slot) const {
  return flags_.get(bucket, slot);
}

bool GpuBuckets::in_flight() const {
  return (flags_.work() && !flags_.work()->done()) ||
         std::any_of(state_.begin(), state_.end(),
                     [](const State& bucket) { return bucket.work && !bucket.work->done(); });
}

void GpuBuckets::give_up() {
  for (const State& bucket : state_) {
    if (bucket.work) wait_out(*bucket.work);
  }
  if (flags_.work()) wait_out(*flags_.work());
}

}  // namespace pycomm
