#include <cstddef>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "reducer/bucket_plan.h"

namespace {

using pycomm::Bucket;
using pycomm::DType;
using pycomm::ParameterSpec;
using pycomm::plan_buckets;

using Indices = std::vector<std::size_t>;

TEST(parameters_fill_buckets_in_the_order_of_their_arrival) {
  const std::vector<ParameterSpec> parameters(5, {DType::kFloat32, 4});
  const auto buckets = plan_buckets(parameters, Indices{4, 3, 2, 1, 0}, 32, 16);
  CHECK_EQUAL(buckets.size(), 3);
  CHECK(buckets[0].parameters == Indices{4});  // the first bucket is smaller
  CHECK(buckets[1].parameters == (Indices{3, 2}));
  CHECK(buckets[2].parameters == (Indices{1, 0}));
  CHECK(buckets[1].offsets == (Indices{0, 4}));
  CHECK_EQUAL(buckets[1].flags_offset, 8);
  CHECK_EQUAL(buckets[1].count, 10);
}

TEST(a_bucket_holds_one_dtype_and_goes_where_its_last_parameter_stands) {
  const std::vector<ParameterSpec> parameters{
      {DType::kFloat32, 2}, {DType::kBFloat16, 2}, {DType::kBFloat16, 2}, {DType::kFloat32, 2}};
  const auto buckets = plan_buckets(parameters, Indices{0, 1, 2, 3}, 1024, 1024);
  CHECK_EQUAL(buckets.size(), 2);
  CHECK(buckets[0].parameters == (Indices{1, 2}));
  CHECK(buckets[1].parameters == (Indices{0, 3}));
}

TEST(gradients_start_on_16_byte_boundaries) {
  const std::vector<ParameterSpec> parameters{
      {DType::kBFloat16, 3}, {DType::kBFloat16, 0}, {DType::kBFloat16, 9}};
  const auto buckets = plan_buckets(parameters, Indices{0, 1, 2}, 1024, 1024);
  CHECK(buckets[0].offsets == (Indices{0, 8, 8}));
  CHECK_EQUAL(buckets[0].flags_offset, 24);
}

TEST(unseen_parameters_do_not_hold_up_the_others) {
  const std::vector<ParameterSpec> parameters(4, {DType::kFloat64, 1});
  const auto buckets = plan_buckets(parameters, Indices{2, 0}, 1024, 1024);
  CHECK_EQUAL(buckets.size(), 2);
  CHECK(buckets[0].parameters == (Indices{2, 0}));
  CHECK(buckets[1].parameters == (Indices{1, 3}));
}

TEST(no_parameters_make_no_buckets) {
  CHECK(plan_buckets(std::vector<ParameterSpec>{}, Indices{}, 1, 1).empty());
}

TEST(nonsense_is_refused) {
  const std::vector<ParameterSpec> parameters(2, {DType::kFloat32, 1});
  CHECK_THROWS(plan_buckets(parameters, Indices{1, 1}, 64, 64), pycomm::InvalidArgumentError,
               "parameter 1 of 2 twice");
  CHECK_THROWS(plan_buckets(parameters, Indices{7}, 64, 64), pycomm::InvalidArgumentError,
               "parameter 7 of 2");
  CHECK_THROWS(plan_buckets(parameters, Indices{}, 64, 0), pycomm::InvalidArgumentError,
               "the first of 0");
}

}  // namespace
