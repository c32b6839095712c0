#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "collectives/context.h"
#include "collectives/placement.h"
#include "core/task.h"

namespace pycomm::nccl {

inline constexpr const char* kMalformedProposal =
    "a peer's proposal for what to launch next has another length than expected.\n  All ranks must "
    "run the same version of pycomm.";

/// What each rank of a group shows the others before their GPUs are connected. Plain bytes.
struct Card {
  int nccl_version = 0;
  std::array<char, 20> bus_id{};      // of its GPU, ends with a zero
  std::array<char, 360> problem{};    // why it cannot take part, ends with a zero; empty: it can
  std::array<char, 128> unique_id{};  // of the communicator, on rank 0's
  /// Why our kernels cannot be loaded, ends with a zero; empty: they can.
  std::array<char, 360> kernels_problem{};
  std::uint64_t scratch_bytes = 0;

  void set_bus_id(const std::string& text);
  void set_problem(const std::string& text);
  void set_kernels_problem(const std::string& text);
  /// Of a card that came from a peer: from here on every text ends with a zero.
  void end_texts();
};

/// Every rank's, by rank: an all-gather of the host. `name` is the user's, for errors.
Task<std::vector<Card>> gather_cards(Context& context, const Card& mine, std::string name);

/// Which rank has no usable NCCL and why, the first there is; empty: all have one.
/// @param ranks  what they are called; none: 0, 1, ...
std::string without_nccl(const std::vector<Card>& cards, const std::vector<int>& ranks = {});

/// Whether no rank has one.
bool all_without_nccl(const std::vector<Card>& cards);

/// Why GPUs with these cards, by rank, cannot be connected, with the remedy; empty: they can. All
/// ranks hold the same cards, so they come to the same answer.
/// @param ranks  as above.
std::string problem_of(const std::vector<Card>& cards, const Placement& placement,
                       const std::vector<int>& ranks = {});

/// Why one of the ranks cannot launch our kernels; empty: all can.
std::string kernels_problem_of(const std::vector<Card>& cards);

/// The first rank that has a problem, and which; empty: none has. An all-gather of the host.
/// @param mine  cut after 359 bytes.
Task<std::string> first_problem(Context& context, std::string mine, std::string name);

/// What every rank has for reductions in exact order.
std::size_t least_scratch_of(const std::vector<Card>& cards);

}  // namespace pycomm::nccl
