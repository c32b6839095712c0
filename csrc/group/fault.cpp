#include "group/fault.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace pycomm {
namespace {

/// A cut-off text is enough to see the pattern.
constexpr std::size_t kMostLinksShown = 6;

/// A thread of a rank that waits.
struct Node {
  const Standing* standing;
  const Standing::Call* call;

  Fault::Concerned concerned() const { return {standing->rank, call->tag}; }
};

std::vector<Node> nodes_of(std::span<const Standing> standings) {
  std::vector<Node> nodes;
  for (const Standing& standing : standings) {
    for (int i = 0; i < standing.call_count; ++i) {
      nodes.push_back({&standing, &standing.calls[static_cast<std::size_t>(i)]});
    }
  }
  std::stable_sort(nodes.begin(), nodes.end(), [](const Node& a, const Node& b) {
    return a.standing->rank < b.standing->rank;
  });
  return nodes;
}

std::optional<Fault> find_mismatch(const std::vector<Node>& nodes) {
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    for (std::size_t j = i + 1; j < nodes.size(); ++j) {
      const Standing::Call& a = *nodes[i].call;
      const Standing::Call& b = *nodes[j].call;
      if (a.group != b.group || a.signature.sequence != b.signature.sequence) continue;
      if (a.hash == b.hash) continue;
      return Fault{describe_mismatch(a.group_rank, a.signature, b.group_rank, b.signature),
                   {nodes[i].concerned(), nodes[j].concerned()}};
    }
  }
  return std::nullopt;
}

/// Whether `from` waits for the rank of `to`, whose thread waits there and has not issued the call.
bool waits_for(const Node& from, const Node& to) {
  if (from.standing->rank == to.standing->rank) return false;
  for (int i = 0; i < to.standing->group_count; ++i) {
    const Standing::Use& use = to.standing->groups[static_cast<std::size_t>(i)];
    if (use.group != from.call->group) continue;
    return use.issued < from.call->number && use.thread == to.call->thread;
  }
  return false;
}

/// Depth first, lowest ranks first, so that all who see the same find the same.
class CircleSearch {
 public:
  explicit CircleSearch(const std::vector<Node>& nodes)
      : nodes_(nodes), colors_(nodes.size(), Color::kNew) {}

  std::vector<Node> find() {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (colors_[i] == Color::kNew && visit(i)) break;
    }
    return circle_;
  }

 private:
  enum class Color { kNew, kOnPath, kDone };

  bool visit(std::size_t at) {
    colors_[at] = Color::kOnPath;
    path_.push_back(at);
    for (std::size_t next = 0; next < nodes_.size(); ++next) {
      if (colors_[next] == Color::kDone || !waits_for(nodes_[at], nodes_[next])) continue;
      if (colors_[next] == Color::kNew) {
        if (visit(next)) return true;
        continue;
      }
      const auto begin = std::find(path_.begin(), path_.end(), next);
      for (auto i = begin; i != path_.end(); ++i) circle_.push_back(nodes_[*i]);
      return true;
    }
    path_.pop_back();
    colors_[at] = Color::kDone;
    return false;
  }

  const std::vector<Node>& nodes_;
  std::vector<Color> colors_;
  std::vector<std::size_t> path_;
  std::vector<Node> circle_;
};

std::string text_of(const std::vector<Node>& circle) {
  std::string text = "ranks wait for each other in a circle, and none of their calls can end:";
  for (std::size_t i = 0; i < circle.size(); ++i) {
    if (i == kMostLinksShown)
      return text + "\n    and so on, " + std::to_string(circle.size()) + " ranks in all.";
    const Standing::Call& call = *circle[i].call;
    const auto end = std::find(call.members.begin(), call.members.end(), '\0');
    text += "\n    rank " + std::to_string(circle[i].standing->rank) + " in " +
            call.signature.describe() + " (call #" + std::to_string(call.signature.sequence) +
            " of the group of ranks " + std::string(call.members.begin(), end) + ") for rank " +
            std::to_string(circle[(i + 1) % circle.size()].standing->rank) +
            (i + 1 < circle.size() ? "," : ".");
  }
  return text;
}

std::optional<Fault> find_circle(const std::vector<Node>& nodes) {
  auto circle = CircleSearch(nodes).find();
  if (circle.empty()) return std::nullopt;
  std::rotate(circle.begin(),
              std::min_element(
                  circle.begin(), circle.end(),
                  [](const Node& a, const Node& b) { return a.standing->rank < b.standing->rank; }),
              circle.end());
  Fault fault;
  fault.text = text_of(circle) +
               "\n  (Ranks here are those of the world.) Ranks that share several groups must "
               "call them in the same order, or start the calls with async_op=True and wait for "
               "them afterwards.";
  for (const Node& node : circle) fault.concerned.push_back(node.concerned());
  return fault;
}

}  // namespace

std::optional<Fault> find_fault(std::span<const Standing> standings) {
  const auto nodes = nodes_of(standings);
  auto mismatch = find_mismatch(nodes);
  return mismatch ? std::move(mismatch) : find_circle(nodes);
}

}  // namespace pycomm
