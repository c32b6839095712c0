#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/dtype.h"

namespace pycomm {

/// What the plan must know of a parameter. A complex gradient counts as twice as many reals.
struct ParameterSpec {
  DType dtype;
  std::size_t count = 0;
};

/// Gradients laid end to end and reduced together:
///
///   | gradient | pad | gradient | pad | ... | used | used | ... |
///   0                                       flags_offset        count
///
/// Each gradient starts on a 16-byte boundary. The flags, one element a parameter in the order of
/// `parameters`, are 1 where a rank used the parameter and 0 where it did not, so that their
/// reduction tells every rank whether anybody did.
struct Bucket {
  DType dtype;
  std::vector<std::size_t> parameters;  // indices into the list of specs
  std::vector<std::size_t> offsets;     // in elements, of each parameter
  std::size_t flags_offset = 0;         // in elements
  std::size_t count = 0;                // elements in all

  /// Where the gradient of a slot (a position in `parameters`) ends with its padding.
  std::size_t end_of(std::size_t slot) const {
    return slot + 1 < offsets.size() ? offsets[slot + 1] : flags_offset;
  }
};

/// Cut the parameters into buckets of one dtype each, in the order of their reduction.
///
/// `order` names the parameters in the order their gradients become final. A bucket takes the next
/// ones of its dtype up to `bucket_cap_bytes` (a larger parameter has a bucket to itself); the
/// bucket of the first one takes only `first_bucket_cap_bytes`, so that reducing starts early.
/// Buckets are sorted by their last parameter: that is when they can be launched. Parameters
/// missing from `order` follow in buckets of their own, in index order, because they would hold
/// up any bucket they lay in. Each parameter is in exactly one bucket.
///
/// @throws InvalidArgumentError  a cap of 0 bytes, or an index in `order` twice or out of range.
std::vector<Bucket> plan_buckets(std::span<const ParameterSpec> parameters,
                                 std::span<const std::size_t> order, std::size_t bucket_cap_bytes,
                                 std::size_t first_bucket_cap_bytes);

}  // namespace pycomm
