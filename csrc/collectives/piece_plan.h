#pragma once

#include <algorithm>
#include <cstddef>

#include "collectives/context.h"
#include "collectives/lane_exchange.h"

namespace pycomm {

/// How an all-reduce between hosts goes through a rank's staging memory: in pieces, which take
/// turns in its two halves, so that one piece is on the wire while the next is copied in and the
/// one before is copied out. All hosts come to the same pieces.
///
/// A half holds, for a piece of n elements in L lanes:
///
///   input      n        this rank's, for the host's other ranks
///   host_sum   n / L    what goes out; the input itself where every host has one rank
///   received   n / L    H times as much for gather and fold
///   result     n / L    what all ranks of the host copy out
struct PiecePlan {
  std::size_t half_bytes;
  std::size_t piece_count;  // elements of every piece but the last
  /// Offsets in a half. `input` is at 0.
  std::size_t host_sum;
  std::size_t received;
  std::size_t result;

  /// @param element  bytes of one on the user's side;  wire: between the hosts.
  /// @param sum_is_input  every host has one rank and nothing widens.
  static constexpr PiecePlan of(const Staging& staging, Algorithm algorithm, std::size_t element,
                                std::size_t wire, int hosts, int lanes, bool sum_is_input) {
    constexpr std::size_t kLine = 64;
    const auto up = [](std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; };
    const auto l = static_cast<std::size_t>(lanes);
    const auto h = static_cast<std::size_t>(hosts);
    PiecePlan plan{};
    plan.half_bytes = staging.bytes(hosts) / 2 / kLine * kLine;
    const std::size_t own_sum = sum_is_input ? 0 : wire;
    const std::size_t sums = algorithm == Algorithm::kGatherFold ? h : 1;
    // Shares differ by one element, chunks too; each of the four parts begins on a cache line.
    const std::size_t slack = 4 * kLine + (own_sum + sums * wire + element) + h * wire;
    const std::size_t each = l * element + own_sum + sums * wire + element;  // of L elements
    const std::size_t room = plan.half_bytes > slack ? plan.half_bytes - slack : 0;
    plan.piece_count = std::max<std::size_t>(1, room / each * l);
    const std::size_t share = (plan.piece_count + l - 1) / l;
    plan.host_sum = sum_is_input ? 0 : up(plan.piece_count * element);
    plan.received = up(sum_is_input ? plan.piece_count * element : plan.host_sum + share * wire);
    plan.result = up(plan.received + LaneExchange::received_bytes(algorithm, share, wire, hosts));
    return plan;
  }

  constexpr bool fits(std::size_t element, int lanes) const {
    const auto l = static_cast<std::size_t>(lanes);
    return result + (piece_count + l - 1) / l * element <= half_bytes;
  }
};

}  // namespace pycomm
