#include "run.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "laws.h"
#include "program.h"
#include "transport/window.h"

namespace simulation {
namespace {

constexpr nanoseconds kNever = nanoseconds::max();
constexpr std::size_t kArenaBytes = std::size_t{64} << 20;

nanoseconds seconds(double value) { return nanoseconds(static_cast<std::int64_t>(value * 1e9)); }

/// A rank's page is the first thing in its arena.
pycomm::ProcessPage* page_of(pycomm::Group& group) {
  const auto block = group.allocate(1);
  return reinterpret_cast<pycomm::ProcessPage*>(block->data() - block->offset());
}

const char* name_of(Outcome::State state) {
  switch (state) {
    case Outcome::State::kNone:
      return "not made";
    case Outcome::State::kBegun:
      return "begun, not over";
    case Outcome::State::kSucceeded:
      return "succeeded";
    case Outcome::State::kRaised:
      return "raised";
    case Outcome::State::kUnknown:
      return "in a turn that raised";
  }
  return "";
}

}  // namespace

Run::Run(const Plan& plan) : plan_(plan), fired_(plan.faults.size()) {
  machine_ = std::make_unique<Machine>(plan.size(), plan.seed ^ 0x5ced, plan.habits);
  network_ = std::make_unique<Network>(*machine_, plan.size(), plan.seed ^ 0x2e7, plan.weather);
  pycomm::Simulation::install(machine_.get());
  machine_->next_event = [this] {
    return std::min(network_->next_event(), timers_.empty() ? kNever : timers_.begin()->first);
  };
  machine_->do_events = [this] {
    network_->do_events();
    while (!timers_.empty() && timers_.begin()->first <= machine_->now()) {
      const auto timer = timers_.begin()->second;
      timers_.erase(timers_.begin());
      timer();
    }
  };
}

Run::~Run() {
  // Everything of the core goes while its machine is still there.
  for (auto& program : programs_) program->release();
  worlds_.clear();
  programs_.clear();
  pycomm::Simulation::install(nullptr);
}

const Outcome& Run::outcome(int rank, int id) const {
  return programs_[static_cast<std::size_t>(rank)]->outcomes[static_cast<std::size_t>(id)];
}

bool Run::has_made(int rank, int group) const {
  const auto& made = programs_[static_cast<std::size_t>(rank)]->groups;
  return made[static_cast<std::size_t>(group)] != nullptr;
}

const Fault* Run::take(Fault::Kind kind, int rank, int step) {
  for (std::size_t i = 0; i < plan_.faults.size(); ++i) {
    const Fault& fault = plan_.faults[i];
    if (fired_[i] || fault.kind != kind || fault.rank != rank || fault.step != step) continue;
    fired_[i] = true;
    return &fault;
  }
  return nullptr;
}

void Run::at_point(int rank) {
  Program& program = *programs_[static_cast<std::size_t>(rank)];
  if (program.over() || ending_) return;
  ++program.points;
  for (std::size_t i = 0; i < plan_.faults.size(); ++i) {
    const Fault& fault = plan_.faults[i];
    if (fired_[i] || fault.rank != rank) continue;
    const bool due = program.step() > fault.step ||
                     (program.step() == fault.step && program.points > fault.points);
    if (!due) continue;
    switch (fault.kind) {
      case Fault::Kind::kDiffer:
      case Fault::Kind::kSkip:
      case Fault::Kind::kLeave:
      case Fault::Kind::kAbort:
        break;  // the program does these itself
      default:
        fired_[i] = true;
        fire(fault);
    }
  }
}

void Run::fire(const Fault& fault) {
  switch (fault.kind) {
    case Fault::Kind::kKill:
      note(fault.kind, fault.rank);
      kill(fault.rank);
      break;
    case Fault::Kind::kStop:
      note(fault.kind, fault.rank);
      machine_->stop(fault.rank);
      break;
    case Fault::Kind::kPause: {
      note(fault.kind, fault.rank);
      events_.back().variant = fault.variant;
      machine_->stop(fault.rank);
      const int rank = fault.rank;
      timers_.emplace(machine_->now() + std::chrono::milliseconds(fault.variant),
                      [this, rank] { machine_->go_on(rank); });
      break;
    }
    case Fault::Kind::kInterrupt:
      programs_[static_cast<std::size_t>(fault.rank)]->interrupted = true;
      break;
    case Fault::Kind::kCut: {
      note(fault.kind, fault.rank);
      std::vector<int> ranks;
      const auto& hosts = plan_.hosts;
      for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
        if (hosts[rank] == hosts[static_cast<std::size_t>(fault.rank)]) {
          ranks.push_back(static_cast<int>(rank));
        }
      }
      network_->cut(ranks);
      break;
    }
    default:
      break;
  }
}

void Run::kill(int rank) {
  machine_->stop(rank);
  network_->kill(rank);
  // The kernel marks the word a moment later.
  timers_.emplace(machine_->now() + std::chrono::microseconds(100),
                  [this, rank] { pages_[static_cast<std::size_t>(rank)]->life.mark_owner_died(); });
}

const std::vector<std::string>& Run::run() {
  pycomm::Process::Options options{plan_.timeouts[0], kArenaBytes, {plan_.piece_bytes}, {}};
  options.tuning.algorithm = plan_.algorithm;
  machine_->set_rank(0);
  // Each process starts its progress thread, in the order of the ranks.
  int next_rank = 0;
  machine_->on_start = [&] { machine_->set_rank(next_rank++); };
  options.host_timeout_s = plan_.host_timeout_s;
  worlds_ = pycomm::World::loopback(plan_.hosts, options, network_->channels());
  machine_->on_start = nullptr;
  for (int rank = 0; rank < plan_.size(); ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    pages_.push_back(page_of(*worlds_[at]->group()));
    programs_.push_back(std::make_unique<Program>(*this, rank, *worlds_[at]));
  }
  machine_->at_point = [this](int rank) { at_point(rank); };
  for (int rank = 0; rank < plan_.size(); ++rank) {
    machine_->set_rank(rank);
    machine_->start([this, rank] { programs_[static_cast<std::size_t>(rank)]->run(); });
  }
  const auto lost_for_ever = [this](int rank) {
    return std::any_of(events_.begin(), events_.end(), [rank](const Event& event) {
      return event.rank == rank &&
             (event.kind == Fault::Kind::kKill || event.kind == Fault::Kind::kStop);
    });
  };
  const auto over = [&] {
    for (int rank = 0; rank < plan_.size(); ++rank) {
      if (!programs_[static_cast<std::size_t>(rank)]->over() && !lost_for_ever(rank)) return false;
    }
    return true;
  };
  try {
    machine_->run(over, seconds(60 + 10 * plan_.all_timeouts()));
  } catch (const Violation& violation) {
    found(violation.what());
    return found_;  // nothing can be taken down in good order
  }
  for (const auto& program : programs_) program->check_results_again();
  if (!network_->misuse().empty()) found(network_->misuse());
  check_laws(*this, found_);
  // Take down what is left, to the destructors.
  machine_->at_point = nullptr;
  ending_ = true;
  for (int rank = 0; rank < plan_.size(); ++rank) machine_->go_on(rank);
  try {
    machine_->run(
        [this] {
          return std::all_of(programs_.begin(), programs_.end(),
                             [](const auto& program) { return program->over(); });
        },
        seconds(1e6));
  } catch (const Violation& violation) {
    found(std::string("while the lost ranks unwind: ") + violation.what());
  }
  return found_;
}

std::string Run::describe() const {
  std::string text;
  const auto milliseconds = [](nanoseconds time) {
    return std::to_string(static_cast<double>(time.count()) / 1e6) + " ms";
  };
  for (const Event& event : events_) {
    text += "  " + milliseconds(event.when) + ": rank " + std::to_string(event.rank) + " " +
            simulation::name_of(event.kind) +
            (event.group >= 0 ? " (group " + std::to_string(event.group) + ")" : "") +
            (event.call >= 0 ? " (call #" + std::to_string(event.call) + ")" : "") + "\n";
  }
  for (int id = 0; id <= plan_.calls; ++id) {
    for (int rank = 0; rank < plan_.size(); ++rank) {
      const Outcome& one = outcome(rank, id);
      if (one.state == Outcome::State::kNone) continue;
      text += "  " + (id == plan_.calls ? std::string("shutdown") : "call #" + std::to_string(id)) +
              ", rank " + std::to_string(rank) + ": " + name_of(one.state) + ", " +
              milliseconds(one.begun) + " to " + milliseconds(one.ended);
      if (one.state == Outcome::State::kRaised) text += ": " + one.text;
      text += "\n";
    }
  }
  return text;
}

}  // namespace simulation
