#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "group/group.h"
#include "group/turn.h"
#include "reducer/bucket_store.h"
#include "reducer/used_flags.h"

namespace pycomm {

/// Buckets in this rank's arena. Each ends with flags, one element a parameter, so that one
/// reduction tells the sums and who used what.
///
/// Inside one host the thread that reports gradients reduces them too, a piece whenever it comes by
/// (Turn); between hosts the progress thread does. With an exchange that thread compresses and
/// decompresses, and the progress thread moves what is sent.
class HostBuckets final : public BucketStore {
 public:
  /// @param counts  elements of each parameter.
  /// @param exchange  instead of the all-reduces.
  HostBuckets(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets,
              const std::vector<std::size_t>& counts,
              std::optional<BucketExchange> exchange = std::nullopt);
  ~HostBuckets() override;

  /// Where a bucket lies; stays valid as long as somebody holds it.
  std::shared_ptr<ArenaBlock> memory(std::size_t bucket) const { return state_[bucket].memory; }

  void fill(std::size_t bucket, std::size_t slot, const std::byte* gradient,
            StreamAddress stream) override;
  void launch(std::size_t bucket, const Contribution& contribution, Operation operation,
              StreamAddress stream) override;
  void advance() override;
  void finish(const std::string& pass) override;
  void wait(const InterruptCheck& check_interrupt, StreamAddress stream) override;
  bool used(std::size_t bucket, std::size_t slot) const override;
  bool in_flight() const override;
  void give_up() override;

 private:
  struct State {
    std::shared_ptr<ArenaBlock> memory;
    std::shared_ptr<Work> work;  // of the pass in flight; null if turn_ has it
  };

  std::byte* element(std::size_t bucket, std::size_t offset) const;
  std::size_t bytes_of(std::size_t bucket, std::size_t slot) const;

  const std::shared_ptr<Group> group_;
  const std::vector<Bucket> buckets_;
  const std::vector<std::size_t> counts_;
  const std::optional<BucketExchange> exchange_;
  std::optional<UsedFlags> flags_;  // if there is an exchange
  std::vector<State> state_;
  bool fits_caches_ = false;    // all buckets together
  std::unique_ptr<Turn> turn_;  // of the pass in flight, inside one host
};

}  // namespace pycomm
