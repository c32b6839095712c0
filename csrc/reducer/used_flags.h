#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "group/group.h"
#include "kernels/extent.h"
#include "reducer/bucket_plan.h"

namespace pycomm {

/// Who used which parameter, and how large gradients are, where the buckets cannot carry it: one
/// more reduction, of a byte a parameter and one a bucket, in the host's memory.
class UsedFlags {
 public:
  UsedFlags(std::shared_ptr<Group> group, const std::vector<Bucket>& buckets);
  ~UsedFlags();
  UsedFlags(const UsedFlags&) = delete;
  UsedFlags& operator=(const UsedFlags&) = delete;

  void set(std::size_t bucket, const std::vector<bool>& used);
  /// Of what this rank brings to a bucket; kSummable unless it is set.
  void set_extent(std::size_t bucket, Extent extent);
  /// All are set. `pass` is its name for errors and signatures.
  void launch(const std::string& pass);
  void wait(const InterruptCheck& check_interrupt);
  /// Whether any rank used the parameter; once wait() has returned.
  bool get(std::size_t bucket, std::size_t slot) const;
  /// The largest that a rank has set; likewise.
  Extent extent(std::size_t bucket) const;

  /// Of the pass in flight; null: none was launched yet.
  const std::shared_ptr<Work>& work() const { return work_; }

 private:
  std::byte* flag(std::size_t bucket, std::size_t slot) const {
    return memory_->data() + begins_[bucket] + 1 + slot;
  }

  const std::shared_ptr<Group> group_;
  std::vector<std::size_t> begins_;  // of each bucket's: its extent, then its flags
  std::size_t count_ = 0;
  std::shared_ptr<ArenaBlock> memory_;
  std::shared_ptr<Work> work_;
};

}  // namespace pycomm
