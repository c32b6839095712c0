#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/device_memory.h"
#include "group/group.h"
#include "reducer/bucket_store.h"
#include "reducer/used_flags.h"

namespace pycomm {

/// Buckets on a GPU, reduced there by NCCL. The gradients of a bucket are copied into it all at
/// once, when the last has been computed; the host waits for none of that. Who used which parameter
/// is told on the host, where it is needed.
class GpuBuckets final : public BucketStore {
 public:
  /// Collective.
  ///
  /// @param counts  elements of each parameter.
  /// @param stream  on which the buckets are zeroed.
  /// @param exchange  instead of the all-reduces.
  /// @throws CommError  no such GPU, no NCCL, or not so much memory.
  GpuBuckets(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets,
             const std::vector<std::size_t>& counts, int device, StreamAddress stream,
             const InterruptCheck& check_interrupt,
             std::optional<BucketExchange> exchange = std::nullopt);

  /// Where a bucket lies; stays valid as long as somebody holds it.
  std::shared_ptr<DeviceMemory> memory(std::size_t bucket) const { return state_[bucket].memory; }

  void begin() override;
  void fill(std::size_t bucket, std::size_t slot, const std::byte* gradient,
            StreamAddress stream) override;
  void launch(std::size_t bucket, const Contribution& contribution, Operation operation,
              StreamAddress stream) override;
  void finish(const std::string& pass) override;
  void wait(const InterruptCheck& check_interrupt, StreamAddress stream) override;
  bool used(std::size_t bucket, std::size_t slot) const override;
  bool in_flight() const override;
  void give_up() override;

 private:
  struct State {
    std::shared_ptr<DeviceMemory> memory;
    /// By slot, until the bucket is launched: where the gradient lies; null: in the bucket.
    std::vector<const std::byte*> gradients;
    /// What comes before the bucket's launch: on which gradients of this pass were computed, ...
    std::vector<StreamAddress> streams;
    std::shared_ptr<Work> work;  // of the pass in flight
  };

  static void note(State& state, StreamAddress stream);
  /// What was filled has been copied, or does not count.
  static void forget_gradients(State& state);

  const std::shared_ptr<Group> group_;
  const std::vector<Bucket> buckets_;
  const std::vector<std::size_t> counts_;
  const int device_;
  const std::optional<BucketExchange> exchange_;
  /// Where the buckets were used last: by the caller, once the pass before was over.
  StreamAddress read_on_;
  std::vector<State> state_;
  UsedFlags flags_;
};

}  // namespace pycomm
