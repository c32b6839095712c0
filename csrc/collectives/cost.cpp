#include "collectives/cost.h"

#include <algorithm>

#include "collectives/open.h"
#include "collectives/partition.h"
#include "collectives/piece_plan.h"
#include "collectives/segments.h"

namespace pycomm {
namespace {

/// A host's sum that rides on the opening messages is at most this long, if it need not go through
/// the announcement.
constexpr std::size_t kLongestRide = 64 << 10;

int rounds_of(int hosts) {
  int rounds = 0;
  while ((std::int64_t{1} << rounds) < hosts) ++rounds;
  return rounds;
}

/// As many sums as gather-and-fold sends in the round of this distance.
std::size_t sums_in_round(int hosts, std::int64_t distance) {
  return static_cast<std::size_t>(std::min<std::int64_t>(distance, hosts - distance));
}

PiecePlan plan_of(Algorithm algorithm, const AllReduceJob& job) {
  const DType wire = wire_dtype(job, algorithm);
  return PiecePlan::of(Staging{job.piece_bytes}, algorithm, size_of(job.dtype), size_of(wire),
                       job.hosts, job.lanes, job.ranks_per_host == 1 && wire == job.dtype);
}

Traffic opening_traffic(const AllReduceJob& job, std::size_t sum_bytes) {
  Traffic traffic;
  for (std::int64_t distance = 1; distance < job.hosts; distance *= 2) {
    const std::size_t sums = sum_bytes == 0 ? 0 : sums_in_round(job.hosts, distance);
    traffic += {1, agreement_bytes(static_cast<int>(sums), sum_bytes)};
  }
  return traffic;
}

/// One lane's exchange of a share.
Traffic share_traffic(Algorithm algorithm, const AllReduceJob& job, std::size_t count, int host) {
  const std::size_t wire = size_of(wire_dtype(job, algorithm));
  const std::size_t element = size_of(job.dtype);
  Traffic traffic;
  if (algorithm == Algorithm::kGatherFold) {
    for (std::int64_t distance = 1; distance < job.hosts; distance *= 2) {
      const std::size_t sums = sums_in_round(job.hosts, distance) * count;
      traffic += {segments_of(sums, 1, wire), sums * wire};
    }
    return traffic;
  }
  const auto others = static_cast<std::uint64_t>(job.hosts - 1);
  const auto chunk = [&](int index) {
    return partition(count, job.hosts, index % job.hosts).count();
  };
  traffic.messages = 2 * others * segments_of(count, job.hosts, wire);
  // All chunks but the one that it owns at last, and that one for each of the others; in the ring
  // what it passes on then are all chunks but its right neighbour's.
  traffic.bytes = algorithm == Algorithm::kRing
                      ? (count - chunk(host + 1)) * wire + (count - chunk(host + 2)) * element
                      : (count - chunk(host)) * wire + others * chunk(host) * element;
  return traffic;
}

}  // namespace

DType wire_dtype(const AllReduceJob& job, Algorithm algorithm) {
  const bool sends_input = job.ranks_per_host == 1 && algorithm != Algorithm::kRing;
  return sends_input ? job.dtype : accumulator_of(job.dtype);
}

bool rides(const AllReduceJob& job) {
  const std::size_t sum = job.count * size_of(wire_dtype(job, Algorithm::kGatherFold));
  const std::size_t longest = job.ranks_per_host == 1 ? kLongestRide : Announcement::kEagerBytes;
  return job.bytes() <= longest &&
         agreement_bytes(job.hosts, sum) <= Staging{job.piece_bytes}.bytes(job.hosts) / 2;
}

bool is_possible(Algorithm algorithm, const AllReduceJob& job) {
  if (algorithm == Algorithm::kGatherFold && rides(job)) return true;
  return plan_of(algorithm, job).fits(size_of(job.dtype), job.lanes);
}

Algorithm choose_algorithm(const CostModel& cost, const AllReduceJob& job) {
  const bool gather = is_possible(Algorithm::kGatherFold, job) &&
                      predict_seconds(cost, Algorithm::kGatherFold, job) <
                          predict_seconds(cost, Algorithm::kDirect, job);
  return gather ? Algorithm::kGatherFold : Algorithm::kDirect;
}

double predict_seconds(const CostModel& cost, Algorithm algorithm, const AllReduceJob& job) {
  const auto n = static_cast<double>(job.bytes());
  if (job.hosts == 1) return 2 * n * cost.gamma_s_per_byte + 2 * cost.meeting_s;
  const double h = job.hosts;
  const double lanes = job.lanes;
  const double rounds = rounds_of(job.hosts);
  const double m =
      static_cast<double>(job.count) * static_cast<double>(size_of(wire_dtype(job, algorithm)));
  const auto piece_count = static_cast<double>(plan_of(algorithm, job).piece_count);
  double pieces = std::max(1.0, static_cast<double>(job.count) / piece_count);
  double seconds = rounds * cost.alpha_s;
  if (algorithm == Algorithm::kGatherFold) {
    if (rides(job)) {
      pieces = 0;
    }
    seconds += pieces * rounds * cost.alpha_s + (h - 1) * m * cost.beta_s_per_byte +
               h * m / lanes * cost.gamma_s_per_byte;
  } else {
    const double folded = algorithm == Algorithm::kRing ? (h - 1) / h * m : m;
    seconds += 2 * (h - 1) * cost.alpha_s + (h - 1) / h * (m + n) * cost.beta_s_per_byte +
               folded / lanes * cost.gamma_s_per_byte;
  }
  if (job.ranks_per_host > 1) {
    seconds += (job.ranks_per_host / lanes + 2) * n * cost.gamma_s_per_byte +
               (pieces + 1) * cost.meeting_s;
  }
  return seconds;
}

Traffic traffic_of(Algorithm algorithm, const AllReduceJob& job, int host, int local_rank) {
  Traffic traffic;
  if (job.hosts == 1) return traffic;
  const bool riding = algorithm == Algorithm::kGatherFold && rides(job);
  if (local_rank == 0) {
    const std::size_t sum = job.count * size_of(wire_dtype(job, algorithm));
    traffic += opening_traffic(job, riding ? sum : 0);
  }
  if (riding || local_rank >= job.lanes) return traffic;
  const std::size_t piece_count = plan_of(algorithm, job).piece_count;
  const auto piece = [&](std::size_t count) {
    const Range share = partition(count, job.lanes, local_rank);
    return share_traffic(algorithm, job, share.count(), host);
  };
  traffic += job.count / piece_count * piece(piece_count);
  if (job.count % piece_count > 0) traffic += piece(job.count % piece_count);
  return traffic;
}

}  // namespace pycomm
