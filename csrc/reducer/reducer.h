#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "group/group.h"
#include "reducer/bucket_plan.h"
#include "reducer/bucket_store.h"

namespace pycomm {

/// Counts gradients as they become final and reduces each bucket once it is full, all ranks in the
/// same order: bucket b is launched when all its parameters are final and b-1 was launched.
///
/// One synchronised backward pass is   begin  (fill? ready | hold)*  finish  wait  used*   and is
/// made by one thread at a time. A gradient lies in its bucket before it is reported: fill() copies
/// it there, or the caller writes it. (On a GPU the copy is made when the bucket is launched, all
/// of its gradients at once.) What was not reported counts as zero. From the launch of its bucket
/// until wait() returns a gradient belongs to the reduction.
///
/// `stream` is where the caller's work goes on the GPU of the buckets; 0 if they are the host's.
///
/// Dropping a reducer whose buckets are in flight finishes its group: nobody could complete them.
class Reducer {
 public:
  struct Parameter {
    std::string name;
    ParameterSpec spec;
    /// How often a backward pass reports it before it is final; at least 1.
    std::uint32_t expected_firings = 1;
  };

  /// @param store    of these buckets, for these parameters.
  /// @param overlap  false: launch nothing before finish().
  /// @param algorithm  of the all-reduces.
  Reducer(std::shared_ptr<Group> group, std::vector<Parameter> parameters,
          std::vector<Bucket> buckets, std::shared_ptr<BucketStore> store, bool overlap,
          Algorithm algorithm = Algorithm::kAuto);
  ~Reducer();
  Reducer(const Reducer&) = delete;
  Reducer& operator=(const Reducer&) = delete;

  const std::vector<Bucket>& buckets() const { return buckets_; }

  /// How many buckets of the current or last pass were launched: the first ones.
  std::size_t launched() const { return launched_; }

  /// Open a pass. A pass that was opened before and abandoned (an exception ended its backward) is
  /// forgotten if nothing of it was launched.
  ///
  /// @param op       kSum or kAvg.
  /// @param divisor  of AVG; 0 stands for the group's size.
  /// @param label    tells passes apart in signatures: ranks whose passes differ get a
  ///                 MismatchError, not each other's gradients.
  /// @throws CommError  buckets of the abandoned pass were launched; the group is finished.
  void begin(ReduceOp op, std::int64_t divisor, std::int64_t label);

  /// Copy a gradient into its bucket, where it lies as it does at `gradient`: without gaps, in the
  /// order of the bucket's view.
  void fill(std::size_t parameter, const std::byte* gradient, StreamAddress stream);

  /// The parameter's hook has fired once more and its gradient lies in the bucket.
  /// @throws CommError  its bucket is already in flight; the group is finished.
  void ready(std::size_t parameter, StreamAddress stream);

  /// The parameter was not used in this pass, but what lies in the bucket counts.
  void hold(std::size_t parameter);

  /// Parameters not reported yet in this pass.
  std::vector<std::size_t> unfired() const;

  /// The backward pass is over: launch the remaining buckets. Learns that a parameter fired more
  /// often than expected.
  void finish(StreamAddress stream);

  /// Block until all buckets are reduced; rethrows what ended one of them.
  void wait(const InterruptCheck& check_interrupt, StreamAddress stream);

  /// Whether any rank used the parameter in the pass that wait() ended.
  bool used(std::size_t parameter) const;

 private:
  struct ParameterState {
    std::size_t bucket = 0;
    std::size_t slot = 0;  // position within the bucket
    std::uint32_t firings = 0;
    bool held = false;
  };
  struct BucketState {
    std::size_t missing = 0;  // parameters that have not fired as often as expected
    std::string description;
  };

  /// For errors and signatures.
  std::string pass() const;
  void launch_next(StreamAddress stream);
  void reset();
  [[noreturn]] void fail(const std::string& reason);

  std::shared_ptr<Group> group_;
  std::vector<Parameter> parameters_;
  std::vector<Bucket> buckets_;
  std::vector<ParameterState> fired_;
  std::vector<BucketState> state_;
  const std::shared_ptr<BucketStore> store_;
  const bool overlap_;
  const Algorithm algorithm_;

  bool open_ = false;
  std::size_t launched_ = 0;  // buckets of this pass, a prefix of buckets_
  ReduceOp op_ = ReduceOp::kAvg;
  std::int64_t divisor_ = 0;
  std::int64_t label_ = 0;
};

}  // namespace pycomm
