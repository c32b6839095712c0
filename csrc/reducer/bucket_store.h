#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/operation.h"
#include "group/work.h"
#include "reducer/bucket_plan.h"

namespace pycomm {

/// What a rank brings to a bucket in one pass.
struct Contribution {
  /// By slot, the position of a parameter in its bucket: whether what lies there, or will be copied
  /// there, counts; otherwise zeros do.
  std::vector<bool> present;
  /// By slot: whether the pass used the parameter.
  std::vector<bool> used;
};

/// Makes what the ranks have in a bucket one in another way than by an all-reduce. Called by the
/// thread that reports gradients; on a GPU, whose work goes to its current stream.
struct BucketExchange {
  /// This rank's gradients lie in the bucket, before `flags_offset`: send what the others need, as
  /// an operation of the group, which the result is. `operation` is the all-reduce that it
  /// replaces.
  std::function<std::shared_ptr<Work>(std::size_t bucket, const Operation& operation)> launch;
  /// That operation is over: write the result into the bucket.
  std::function<void(std::size_t bucket)> finish;
};

/// The memory of a reducer's buckets, and what moves in it: the reducer says when. A pass is
/// begin (fill* launch)* finish wait used*; buckets are launched in their order. `stream` is that
/// of the caller's GPU work, and nothing where buckets lie in the host's memory.
class BucketStore {
 public:
  virtual ~BucketStore() = default;

  /// What was filled and not launched, by a pass that was abandoned, does not count.
  virtual void begin() {}

  /// The gradient of a slot has been computed, at `gradient`, where it lies without gaps in the
  /// order of the bucket's view. It stays there until the bucket was launched; null: it lies in the
  /// bucket.
  virtual void fill(std::size_t bucket, std::size_t slot, const std::byte* gradient,
                    StreamAddress stream) = 0;

  /// Reduce a bucket, as `operation` says, which lacks the memory.
  virtual void launch(std::size_t bucket, const Contribution& contribution, Operation operation,
                      StreamAddress stream) = 0;

  /// Go on with what was launched, if the calling thread is to do it.
  virtual void advance() {}

  /// All buckets were launched. `pass` is its name for errors and signatures.
  virtual void finish(const std::string& pass) = 0;

  /// Block until what was launched is over; rethrows what ended one. What is on `stream` from now
  /// on comes after it.
  virtual void wait(const InterruptCheck& check_interrupt, StreamAddress stream) = 0;

  /// Whether a rank used the parameter in the pass that wait() ended.
  virtual bool used(std::size_t bucket, std::size_t slot) const = 0;

  virtual bool in_flight() const = 0;

  /// The group was finished: block until what was launched is over, and let nothing of it go wrong.
  virtual void give_up() = 0;

 protected:
  /// Whoever gives up does not ask how an operation ended.
  static void wait_out(Work& work);

  BucketStore() = default;
  BucketStore(const BucketStore&) = delete;
  BucketStore& operator=(const BucketStore&) = delete;
};

}  // namespace pycomm
