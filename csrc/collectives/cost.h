#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/operation.h"

namespace pycomm {

/// What the machine costs, in seconds. `python -m pycomm bench calibrate` measures it.
///
/// The defaults are estimates, not measurements, for hosts of the last years on 10 Gbit/s Ethernet:
/// TCP carries 94 % of its bits, a message through MPI and the progress threads of both ends takes
/// some 50 us, and a core folds 10 GB/s from memory. Only where gather-and-fold gives way to direct
/// exchange depends on them, never a result.
struct CostModel {
  /// alpha: a message between two hosts, however short.
  double alpha_s = 50e-6;
  /// beta: a byte on a host's link, each way; the lanes of a host share it.
  double beta_s_per_byte = 1 / 1.175e9;
  /// gamma: a byte read and folded, or copied, by one core.
  double gamma_s_per_byte = 0.1e-9;
  /// A meeting of a host's ranks.
  double meeting_s = 1e-6;

  friend bool operator==(const CostModel&, const CostModel&) = default;
};

/// What init() settles about the choice of algorithms, the same on all ranks.
struct Tuning {
  CostModel cost;
  /// Runs wherever an operation leaves the choice; kAuto: the cost decides.
  Algorithm algorithm = Algorithm::kAuto;
};

/// An all-reduce, as far as its cost depends on it.
struct AllReduceJob {
  std::size_t count;
  DType dtype;
  int hosts;
  /// The largest number of ranks on any host.
  int ranks_per_host;
  /// The smallest: as many ranks of each host talk to the other hosts.
  int lanes;
  /// Staging::piece_bytes.
  std::size_t piece_bytes;

  std::size_t bytes() const { return count * size_of(dtype); }
};

/// What one rank hands to its channel.
struct Traffic {
  std::uint64_t messages = 0;
  std::uint64_t bytes = 0;

  Traffic& operator+=(const Traffic& other) {
    messages += other.messages;
    bytes += other.bytes;
    return *this;
  }
  friend Traffic operator*(std::uint64_t times, const Traffic& traffic) {
    return {times * traffic.messages, times * traffic.bytes};
  }
  friend bool operator==(const Traffic&, const Traffic&) = default;
};

/// What travels between hosts: the accumulator's type, or the dtype itself where every host has a
/// single rank, which therefore sends its input (the ring sends partial sums even there).
DType wire_dtype(const AllReduceJob& job, Algorithm algorithm);

/// Whether the hosts' sums ride on the messages that open the operation (gather and fold only).
bool rides(const AllReduceJob& job);

/// Whether the staging memory holds at least one element of every host.
bool is_possible(Algorithm algorithm, const AllReduceJob& job);

/// The algorithm with the shortest predicted time among those with the same bits: direct exchange
/// and gather-and-fold.
Algorithm choose_algorithm(const CostModel& cost, const AllReduceJob& job);

/// Seconds from the first rank's call to the last one's return, all starting together. With p ranks
/// on each of H hosts, S lanes, n bytes of the user's and m bytes between hosts:
///
///   opening       ceil(log2 H) alpha
///   direct        2(H-1) alpha + (H-1)/H (m + n) beta + m/S gamma
///   ring          2(H-1) alpha + (H-1)/H (m + n) beta + (H-1)/H m/S gamma
///   gather_fold   per piece ceil(log2 H) alpha + (H-1) m beta + H m/S gamma; 0 alpha if it rides
///   inside        (p/S + 2) n gamma + a meeting for each piece (p > 1)
///   one host      2 n gamma + two meetings
///
/// All but the first piece's messages are hidden behind the wire.
/// @param algorithm  not kAuto.
double predict_seconds(const CostModel& cost, Algorithm algorithm, const AllReduceJob& job);

/// Exactly what a rank sends, opening included. O(log H), whatever the size.
/// @param algorithm  not kAuto.
Traffic traffic_of(Algorithm algorithm, const AllReduceJob& job, int host, int local_rank);

}  // namespace pycomm
