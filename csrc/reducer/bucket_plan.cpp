#include "reducer/bucket_plan.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "core/error.h"

namespace pycomm {
namespace {

/// Enough for every element type, complex128 included.
constexpr std::size_t kGradientAlignment = 16;

/// Buckets being filled, one for each dtype.
class Filling {
 public:
  Filling(std::span<const ParameterSpec> parameters, std::size_t bucket_cap_bytes,
          std::size_t first_bucket_cap_bytes)
      : parameters_(parameters),
        bucket_cap_bytes_(bucket_cap_bytes),
        next_cap_bytes_(first_bucket_cap_bytes) {}

  void add(std::size_t parameter) {
    const auto [dtype, count] = parameters_[parameter];
    const std::size_t element = size_of(dtype);
    auto open = open_.find(dtype);
    if (open != open_.end() &&
        (open->second.bucket.count + count) * element > open->second.cap_bytes) {
      close(open);
      open = open_.end();
    }
    if (open == open_.end()) {
      open = open_.emplace(dtype, Open{{dtype, {}, {}, 0, 0}, next_cap_bytes_, 0}).first;
      next_cap_bytes_ = bucket_cap_bytes_;
    }
    Bucket& bucket = open->second.bucket;
    bucket.parameters.push_back(parameter);
    bucket.offsets.push_back(bucket.count);
    const std::size_t aligned = kGradientAlignment / element;
    bucket.count = (bucket.count + count + aligned - 1) / aligned * aligned;
    open->second.last_position = position_++;
  }

  void close_all() {
    while (!open_.empty()) close(open_.begin());
  }

  std::vector<Bucket> take() {
    close_all();
    std::sort(closed_.begin(), closed_.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<Bucket> buckets;
    for (auto& [position, bucket] : closed_) buckets.push_back(std::move(bucket));
    return buckets;
  }

 private:
  struct Open {
    Bucket bucket;
    std::size_t cap_bytes;
    std::size_t last_position;
  };

  void close(std::map<DType, Open>::iterator open) {
    Bucket& bucket = open->second.bucket;
    bucket.flags_offset = bucket.count;
    bucket.count += bucket.parameters.size();
    closed_.emplace_back(open->second.last_position, std::move(bucket));
    open_.erase(open);
  }

  std::span<const ParameterSpec> parameters_;
  std::size_t bucket_cap_bytes_;
  std::size_t next_cap_bytes_;
  std::size_t position_ = 0;
  std::map<DType, Open> open_;
  std::vector<std::pair<std::size_t, Bucket>> closed_;  // with the position of the last parameter
};

}  // namespace

std::vector<Bucket> plan_buckets(std::span<const ParameterSpec> parameters,
                                 std::span<const std::size_t> order, std::size_t bucket_cap_bytes,
                                 std::size_t first_bucket_cap_bytes) {
  if (bucket_cap_bytes == 0 || first_bucket_cap_bytes == 0) {
    throw InvalidArgumentError("plan_buckets: a bucket of " + std::to_string(bucket_cap_bytes) +
                               " bytes, the first of " + std::to_string(first_bucket_cap_bytes) +
                               ", holds nothing. Give at least 1.");
  }
  Filling filling(parameters, bucket_cap_bytes, first_bucket_cap_bytes);
  std::vector<bool> seen(parameters.size(), false);
  for (std::size_t parameter : order) {
    if (parameter >= parameters.size() || seen[parameter]) {
      throw InvalidArgumentError(
          "plan_buckets: the order names parameter " + std::to_string(parameter) + " of " +
          std::to_string(parameters.size()) + (parameter < parameters.size() ? " twice." : "."));
    }
    seen[parameter] = true;
    filling.add(parameter);
  }
  filling.close_all();
  for (std::size_t parameter = 0; parameter < parameters.size(); ++parameter) {
    if (!seen[parameter]) filling.add(parameter);
  }
  return filling.take();
}

}  // namespace pycomm
