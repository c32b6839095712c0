#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "group/world.h"
#include "machine.h"
#include "network.h"
#include "plan.h"

namespace simulation {

/// How a call ended on one rank.
struct Outcome {
  enum class State {
    kNone,       // not made here
    kBegun,      // and not over
    kSucceeded,  // with the exact result
    kRaised,
    kUnknown,  // one of a turn that raised, but for the last
  };
  enum class Error { kMismatch, kTimeout, kPeerLost, kInterrupted, kOther };

  State state = State::kNone;
  Error error = Error::kOther;
  std::string text;
  nanoseconds issued{0};
  nanoseconds begun{0};  // to wait
  nanoseconds ended{0};
  /// Calls of the group that this rank had issued and that were not over.
  int ahead = 0;
  /// The group had raised here before.
  bool after_failure = false;
  /// Where it raised: nothing of the output was written.
  bool untouched = true;
};

/// A fault that has come about.
struct Event {
  Fault::Kind kind;
  int rank;
  int group = -1;  // that it concerns; -1: all of the rank's
  int call = -1;   // that differs
  nanoseconds when{0};
  int variant = 0;  // of the fault
};

class Program;

/// One run of a plan, from start-up to shutdown.
class Run {
 public:
  explicit Run(const Plan& plan);
  ~Run();
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  /// What was found; empty: nothing.
  const std::vector<std::string>& run();

  const Plan& plan() const { return plan_; }
  const std::vector<Event>& events() const { return events_; }
  /// The call `id` (plan.calls: shutdown) on a world rank.
  const Outcome& outcome(int rank, int id) const;
  bool has_made(int rank, int group) const;
  /// What every rank made of every call.
  std::string describe() const;
  const Machine& machine() const { return *machine_; }
  const Network& network() const { return *network_; }

 private:
  friend class Program;
  void at_point(int rank);
  void fire(const Fault& fault);
  void kill(int rank);
  void note(Fault::Kind kind, int rank, int group = -1, int call = -1) {
    events_.push_back({kind, rank, group, call, machine_->now()});
  }
  void found(const std::string& what) { found_.push_back(what); }
  /// The fault of this kind that the rank has when it comes to this step, once.
  const Fault* take(Fault::Kind kind, int rank, int step);

  const Plan plan_;
  std::unique_ptr<Machine> machine_;
  std::unique_ptr<Network> network_;
  std::vector<std::unique_ptr<pycomm::World>> worlds_;
  std::vector<pycomm::ProcessPage*> pages_;
  std::vector<std::unique_ptr<Program>> programs_;
  std::vector<bool> fired_;  // by fault
  bool ending_ = false;      // everything was checked: what still waits is interrupted
  std::multimap<nanoseconds, std::function<void()>> timers_;
  std::vector<Event> events_;
  std::vector<std::string> found_;
};

}  // namespace simulation
