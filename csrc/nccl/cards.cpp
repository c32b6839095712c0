#include "nccl/cards.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "nccl/everyones.h"
#include "nccl/versions.h"

namespace pycomm::nccl {
namespace {

template <std::size_t length>
void put(std::array<char, length>& field, const std::string& text) {
  field.fill('\0');
  std::copy_n(text.begin(), std::min(text.size(), length - 1), field.begin());
}

std::string name_of(std::size_t index, const std::vector<int>& ranks) {
  return std::to_string(ranks.empty() ? static_cast<int>(index) : ranks[index]);
}

}  // namespace

void Card::set_bus_id(const std::string& text) { put(bus_id, text); }

void Card::set_problem(const std::string& text) { put(problem, text); }

void Card::set_kernels_problem(const std::string& text) { put(kernels_problem, text); }

void Card::end_texts() { bus_id.back() = problem.back() = kernels_problem.back() = '\0'; }

Task<std::vector<Card>> gather_cards(Context& context, const Card& mine, std::string name) {
  auto cards = co_await everyones(context, mine, std::move(name));
  for (Card& card : cards) card.end_texts();
  co_return cards;
}

std::string without_nccl(const std::vector<Card>& cards, const std::vector<int>& ranks) {
  for (std::size_t rank = 0; rank < cards.size(); ++rank) {
    if (cards[rank].problem[0] == '\0') continue;
    return "rank " + name_of(rank, ranks) + " cannot use NCCL: " + cards[rank].problem.data();
  }
  return "";
}

bool all_without_nccl(const std::vector<Card>& cards) {
  return std::all_of(cards.begin(), cards.end(),
                     [](const Card& card) { return card.problem[0] != '\0'; });
}

std::string problem_of(const std::vector<Card>& cards, const Placement& placement,
                       const std::vector<int>& ranks) {
  const auto name = [&](std::size_t index) { return name_of(index, ranks); };
  if (std::string lack = without_nccl(cards, ranks); !lack.empty()) return lack;
  for (std::size_t rank = 1; rank < cards.size(); ++rank) {
    if (cards[rank].nccl_version == cards[0].nccl_version) continue;
    return "rank " + name(0) + " has NCCL " + nccl_version_text(cards[0].nccl_version) +
           " and rank " + name(rank) + " has " + nccl_version_text(cards[rank].nccl_version) +
           ", which do not talk to each other.\n  Install the same PyTorch on all hosts, or name "
           "one NCCL in PYCOMM_NCCL_LIBRARY on every rank; `python -m pycomm info` shows which is "
           "found.";
  }
  std::map<std::pair<int, std::string>, std::size_t> users;
  for (std::size_t rank = 0; rank < cards.size(); ++rank) {
    const std::string bus_id = cards[rank].bus_id.data();
    const auto [user, is_new] = users.try_emplace({placement.host_of[rank], bus_id}, rank);
    if (is_new) continue;
    return "ranks " + name(user->second) + " and " + name(rank) + " both use GPU " + bus_id +
           " of one host, and NCCL takes one rank a GPU.\n  Call "
           "torch.cuda.set_device(pycomm.local_rank()) before making CUDA tensors, and start no "
           "more ranks on a host than it has GPUs. PYCOMM_GPU_TRANSPORT=staged lets ranks share "
           "one.";
  }
  return "";
}

std::string kernels_problem_of(const std::vector<Card>& cards) {
  for (std::size_t rank = 0; rank < cards.size(); ++rank) {
    if (cards[rank].kernels_problem[0] == '\0') continue;
    return "rank " + std::to_string(rank) +
           " has no kernels: " + cards[rank].kernels_problem.data();
  }
  return "";
}

Task<std::string> first_problem(Context& context, std::string mine, std::string name) {
  std::array<char, 360> field;
  put(field, mine);
  auto problems = co_await everyones(context, field, std::move(name));
  for (std::size_t rank = 0; rank < problems.size(); ++rank) {
    problems[rank].back() = '\0';
    if (problems[rank][0] == '\0') continue;
    co_return "rank " + std::to_string(rank) + ": " + problems[rank].data();
  }
  co_return "";
}

std::size_t least_scratch_of(const std::vector<Card>& cards) {
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const Card& card : cards) least = std::min<std::size_t>(least, card.scratch_bytes);
  return least;
}

}  // namespace pycomm::nccl
