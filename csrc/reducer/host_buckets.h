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
/// If asked to, it measures each gradient while it is copied into its bucket, and one more element
/// behind the flags tells all ranks what any has found: 0 for kSummable, 1 for kLarge, NaN for
/// kNonFinite. Any sum of them, in any order, divided or not, is the largest of them.
///
/// Inside one host the thread that reports gradients reduces them too, a piece whenever it comes by
/// (Turn); between hosts the progress thread does. With an exchange that thread compresses and
/// decompresses, and the progress thread moves what is sent.
class HostBuckets final : public BucketStore {
 public:
  /// @param counts  elements of each parameter.
  /// @param exchange  instead of the all-reduces.
  /// @param measures  on all ranks, or on none.
  HostBuckets(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets,
              const std::vector<std::size_t>& counts,
              std::optional<BucketExchange> exchange = std::nullopt, bool measures = false);
  ~HostBuckets() override;

  /// Where a bucket lies; stays valid as long as somebody holds it.
  std::shared_ptr<ArenaBlock> memory(std::size_t bucket) const { return state_[bucket].memory; }

  /// The largest extent that any rank has brought in the pass that wait() ended, the same on every
  /// rank. An exchange may make anything of what it gets: if its result is not finite, this is
  /// kLarge at least. Cost: with an exchange it reads the buckets.
  Extent worst() const;
  /// What this rank has brought in that pass, by parameter: what it used, and what was held.
  std::vector<Extent> brought() const;
  /// Of what lies in a parameter's place now. Cost: reads it.
  Extent extent(std::size_t parameter) const;

  void begin() override;
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
    /// By slot: what this rank brings. Nothing: not measured since the pass began.
    std::vector<std::optional<Extent>> brought;
  };

  std::byte* element(std::size_t bucket, std::size_t offset) const;
  std::size_t bytes_of(std::size_t bucket, std::size_t slot) const;
  /// Of what lies in a bucket.
  Extent extent_at(std::size_t bucket, std::size_t offset, std::size_t bytes) const;
  /// What all ranks have brought to a bucket.
  Extent agreed(std::size_t bucket) const;

  const std::shared_ptr<Group> group_;
  const std::vector<Bucket> buckets_;
  const std::vector<std::size_t> counts_;
  const std::optional<BucketExchange> exchange_;
  const bool measures_;
  std::optional<UsedFlags> flags_;  // if there is an exchange
  std::vector<State> state_;
  bool fits_caches_ = false;    // all buckets together
  std::unique_ptr<Turn> turn_;  // of the pass in flight, inside one host
};

}  // namespace pycomm
