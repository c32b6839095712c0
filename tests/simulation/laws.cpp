#include "laws.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <set>
#include <string>

namespace simulation {
namespace {

using State = Outcome::State;
using Error = Outcome::Error;

/// What a deadline may be late by: sleeps, and looks 50 ms apart.
constexpr nanoseconds kSlack{600'000'000};
/// How soon the ranks of a host hear of what one of them has noticed, or of a death.
constexpr nanoseconds kHeard{400'000'000};
/// When every host has heard every other one, at the latest. One that was never heard has a minute
/// more than the host timeout.
constexpr nanoseconds kMet{250'000'000};
constexpr nanoseconds kStartUp{60'000'000'000};

nanoseconds seconds(double value) { return nanoseconds(static_cast<std::int64_t>(value * 1e9)); }

const char* name_of(Error error) {
  switch (error) {
    case Error::kMismatch:
      return "MismatchError";
    case Error::kTimeout:
      return "CommTimeoutError";
    case Error::kPeerLost:
      return "PeerLostError";
    case Error::kInterrupted:
      return "the interrupt";
    case Error::kOther:
      return "another error";
  }
  return "";
}

class Laws {
 public:
  Laws(const Run& run, std::vector<std::string>& found)
      : run_(run), plan_(run.plan()), found_(found) {
    list_calls();
    for (int group = 0; group < group_count(); ++group) {
      affected_.push_back(is_affected(group) || !was_made_everywhere(group));
    }
  }

  void check() {
    each_call_ended_with_a_result_or_an_error();
    nothing_succeeds_after_a_failure();
    who_comes_late_gets_nothing();
    deadlines_are_kept();
    other_groups_do_not_notice();
    what_differs_writes_nothing();
    if (run_.events().size() == 1) the_error_is_that_of_the_fault(run_.events().front());
  }

 private:
  struct Listed {
    int id;
    int group;
    bool is_letter;
    bool from_any;           // of a letter: its receiver takes it from any rank
    std::vector<int> ranks;  // world ranks that take part
  };

  int group_count() const { return static_cast<int>(plan_.groups.size()); }
  const std::vector<int>& members(int group) const {
    return plan_.groups[static_cast<std::size_t>(group)];
  }
  int host_of(int rank) const { return plan_.hosts[static_cast<std::size_t>(rank)]; }
  double timeout_of(int group) const { return plan_.timeouts[static_cast<std::size_t>(group)]; }
  bool has(int group, int rank) const {
    return std::find(members(group).begin(), members(group).end(), rank) != members(group).end();
  }
  int group_rank(int group, int rank) const {
    return static_cast<int>(std::find(members(group).begin(), members(group).end(), rank) -
                            members(group).begin());
  }
  bool happened_to(int rank, std::initializer_list<Fault::Kind> kinds) const {
    return std::any_of(run_.events().begin(), run_.events().end(), [&](const Event& event) {
      return event.rank == rank && std::find(kinds.begin(), kinds.end(), event.kind) != kinds.end();
    });
  }
  /// It runs to the end, and when it wants to.
  bool is_whole(int rank) const {
    return !happened_to(rank, {Fault::Kind::kKill, Fault::Kind::kStop, Fault::Kind::kPause});
  }
  std::string where(int rank, const Listed& call) const {
    return "rank " + std::to_string(rank) + ", call #" + std::to_string(call.id) + " of group " +
           std::to_string(call.group) + ": ";
  }

  void list_calls() {
    for (const Step& step : plan_.steps) {
      if (step.way == Step::Way::kLetter) {
        calls_.push_back({step.letter.id,
                          step.group,
                          true,
                          step.letter.from_any,
                          {members(step.group)[static_cast<std::size_t>(step.letter.from)],
                           members(step.group)[static_cast<std::size_t>(step.letter.to)]}});
      } else {
        const int group = step.way == Step::Way::kMakeGroup ? 0 : step.group;
        for (const Call& call : step.calls) {
          calls_.push_back({call.id, group, false, false, members(group)});
        }
      }
    }
    calls_.push_back({plan_.calls, 0, false, false, members(0)});
  }

  /// A member is on the host of `rank`.
  bool has_near(int group, int rank) const {
    return std::any_of(members(group).begin(), members(group).end(),
                       [&](int member) { return host_of(member) == host_of(rank); });
  }

  bool is_affected(int group) const {
    for (const Event& event : run_.events()) {
      if (event.group >= 0) {
        if (event.group == group) return true;
        continue;
      }
      if (has(group, event.rank) && event.kind != Fault::Kind::kCut) return true;
      const bool near = has_near(group, event.rank);
      const bool far = std::any_of(members(group).begin(), members(group).end(),
                                   [&](int rank) { return host_of(rank) != host_of(event.rank); });
      if (event.kind == Fault::Kind::kAbort && (near || hosts_talk())) return true;
      if (event.kind == Fault::Kind::kCut && near && far) return true;
    }
    return false;
  }

  void each_call_ended_with_a_result_or_an_error() {
    for (const Listed& call : calls_) {
      for (const int rank : call.ranks) {
        const Outcome& outcome = run_.outcome(rank, call.id);
        if (outcome.state == State::kBegun &&
            !happened_to(rank, {Fault::Kind::kKill, Fault::Kind::kStop})) {
          found_.push_back(where(rank, call) + "it never ended");
        }
        if (outcome.state != State::kRaised) continue;
        if (outcome.error == Error::kOther) {
          found_.push_back(where(rank, call) + "no typed error: " + outcome.text);
        } else if (outcome.error != Error::kInterrupted &&
                   outcome.text.find("rank ") == std::string::npos &&
                   outcome.text.find("ranks ") == std::string::npos) {
          found_.push_back(where(rank, call) + "an error that names nobody: " + outcome.text);
        }
        if (outcome.after_failure && outcome.error == Error::kInterrupted) {
          found_.push_back(where(rank, call) + "a finished group waits");
        }
      }
    }
  }

  /// A member for whom a collective failed takes part in no later one, so nobody completes that;
  /// and what has failed on a rank stays so.
  void nothing_succeeds_after_a_failure() {
    for (int group = 0; group < group_count(); ++group) {
      std::optional<int> failed;
      int failed_on = -1;
      for (const Listed& call : calls_) {
        if (call.group != group) continue;
        for (const int rank : call.ranks) {
          const Outcome& outcome = run_.outcome(rank, call.id);
          if (outcome.state != State::kSucceeded) continue;
          if (call.id == plan_.calls && outcome.after_failure) continue;  // it leaves alone
          if (outcome.after_failure) {
            found_.push_back(where(rank, call) + "succeeded in a group that had raised there");
          }
          if (failed && !call.is_letter && members(group).size() > 1) {
            found_.push_back(where(rank, call) + "succeeded after call #" +
                             std::to_string(*failed) + " had failed on rank " +
                             std::to_string(failed_on));
          }
        }
        if (call.is_letter || failed) continue;
        for (const int rank : call.ranks) {
          const Outcome& outcome = run_.outcome(rank, call.id);
          if (outcome.state == State::kRaised) {
            failed = call.id;
            failed_on = rank;
          }
        }
      }
    }
  }

  /// A group that has failed on one rank of a host is over for all of them: what one of them calls
  /// from then on raises.
  void who_comes_late_gets_nothing() {
    for (const Listed& failed : calls_) {
      for (const int rank : failed.ranks) {
        const Outcome& failure = run_.outcome(rank, failed.id);
        if (failure.state != State::kRaised) continue;
        for (const Listed& call : calls_) {
          if (call.group != failed.group) continue;
          for (const int other : call.ranks) {
            const Outcome& outcome = run_.outcome(other, call.id);
            if (host_of(other) != host_of(rank) || outcome.state != State::kSucceeded) continue;
            if (call.id == plan_.calls && outcome.after_failure) continue;  // it leaves alone
            if (outcome.issued <= failure.ended) continue;
            found_.push_back(where(other, call) + "began after rank " + std::to_string(rank) +
                             " of its host had raised in call #" + std::to_string(failed.id) +
                             ", and succeeded");
          }
        }
      }
    }
  }

  void deadlines_are_kept() {
    for (const Listed& call : calls_) {
      for (const int rank : call.ranks) {
        const Outcome& outcome = run_.outcome(rank, call.id);
        if (outcome.state != State::kSucceeded && outcome.state != State::kRaised) continue;
        if (!is_whole(rank)) continue;
        const double timeout_s =
            call.id == plan_.calls ? 4 * plan_.all_timeouts() : timeout_of(call.group);
        const nanoseconds most =
            nanoseconds(static_cast<std::int64_t>(timeout_s * 1e9)) * (outcome.ahead + 1) + kSlack;
        if (outcome.ended - outcome.begun > most) {
          found_.push_back(where(rank, call) + "ended " +
                           std::to_string((outcome.ended - outcome.begun).count() / 1000000) +
                           " ms after it began, at most " + std::to_string(most.count() / 1000000) +
                           " are allowed");
        }
      }
    }
  }

  static bool tells_of_circle(const Outcome& outcome) {
    return outcome.text.find("wait for each other in a circle") != std::string::npos;
  }
  bool is_in_circle(int group) const {
    return std::any_of(calls_.begin(), calls_.end(), [&](const Listed& call) {
      return call.group == group &&
             std::any_of(call.ranks.begin(), call.ranks.end(),
                         [&](int rank) { return tells_of_circle(run_.outcome(rank, call.id)); });
    });
  }

  void other_groups_do_not_notice() {
    double delay_s = 0;  // that a rank may have spent with groups that failed, or been stopped for
    for (int group = 0; group < group_count(); ++group) {
      if (affected_[static_cast<std::size_t>(group)] || (!hosts_talk() && is_in_circle(group))) {
        delay_s += timeout_of(group) + 1;
      }
    }
    for (const Listed& call : calls_) {
      if (affected_[static_cast<std::size_t>(call.group)]) continue;
      // A circle of calls ends the groups it goes through; other hosts may not be told.
      if (!hosts_talk() && is_in_circle(call.group)) continue;
      for (const int rank : call.ranks) {
        const Outcome& outcome = run_.outcome(rank, call.id);
        if (outcome.state != State::kRaised && outcome.state != State::kBegun) continue;
        if (outcome.error == Error::kTimeout && timeout_of(call.group) <= delay_s) continue;
        if (outcome.after_failure) continue;  // the first one tells
        // Whoever waits for a rank that waits elsewhere for ever is part of the circle.
        if (tells_of_circle(outcome)) continue;
        found_.push_back(where(rank, call) + "nothing happened to this group, and it raised " +
                         name_of(outcome.error) + ": " + outcome.text);
      }
    }
  }
  bool was_made_everywhere(int group) const {
    return std::all_of(members(group).begin(), members(group).end(),
                       [&](int rank) { return was_made(rank, group); });
  }
  /// The group of the plan came into being on that rank.
  bool was_made(int rank, int group) const {
    if (group == 0) return true;
    for (const Step& step : plan_.steps) {
      if (step.way != Step::Way::kMakeGroup || step.group != group) continue;
      return !step.calls.empty() &&
             run_.outcome(rank, step.calls.front().id).state == State::kSucceeded;
    }
    return false;
  }

  void what_differs_writes_nothing() {
    for (const Event& event : run_.events()) {
      if (event.kind != Fault::Kind::kDiffer) continue;
      const auto concerned =
          std::count_if(run_.events().begin(), run_.events().end(),
                        [&](const Event& one) { return one.call == event.call; });
      if (concerned > 1) continue;  // they may differ in the same way
      const auto call = std::find_if(calls_.begin(), calls_.end(),
                                     [&](const Listed& one) { return one.id == event.call; });
      for (const int rank : call->ranks) {
        const Outcome& outcome = run_.outcome(rank, call->id);
        if (outcome.state == State::kSucceeded && !call->is_letter && call->ranks.size() > 1) {
          found_.push_back(where(rank, *call) + "succeeded although rank " +
                           std::to_string(event.rank) + " called something else");
        }
        if (outcome.state == State::kRaised && outcome.error == Error::kMismatch &&
            !outcome.untouched) {
          found_.push_back(where(rank, *call) + "a mismatch, and something was written");
        }
      }
    }
  }

  /// Nobody else is on its host, which falls silent with it.
  bool is_alone(int rank) const {
    return std::count(plan_.hosts.begin(), plan_.hosts.end(), host_of(rank)) == 1;
  }
  /// Somebody else than who has left could still have sent what `receiver` takes from any rank.
  bool another_can_send(int leaver, int receiver, const Listed& call) const {
    if (!call.from_any || receiver != call.ranks[1]) return false;
    const nanoseconds ended = run_.outcome(receiver, call.id).ended;
    return std::any_of(members(call.group).begin(), members(call.group).end(), [&](int member) {
      if (member == leaver || member == receiver) return false;
      const Outcome& shutdown = run_.outcome(member, plan_.calls);
      return shutdown.state == State::kNone || shutdown.begun + seconds(2) > ended;
    });
  }
  /// The others of its host had left before anything of the group raised.
  bool is_left_alone(int rank, int group) const {
    for (int other = 0; other < plan_.size(); ++other) {
      if (other == rank || host_of(other) != host_of(rank)) continue;
      const Outcome& shutdown = run_.outcome(other, plan_.calls);
      const bool left = shutdown.state == State::kSucceeded || shutdown.state == State::kRaised;
      if (!left || shutdown.ended > first_error(group)) return false;
    }
    return true;
  }
  bool hosts_talk() const { return plan_.host_timeout_s > 0; }
  /// How often a rank that does nothing hears of other hosts.
  double period_s() const { return std::min(1.0, plan_.host_timeout_s / 8); }
  /// When a host that is silent since `event` is a lost one, for the group at least.
  nanoseconds lost_by(const Event& event, int group) const {
    nanoseconds since = event.when;
    for (int rank = 0; rank < plan_.size(); ++rank) {
      // Who speaks for its host after it begins to count.
      const Outcome& shutdown = run_.outcome(rank, plan_.calls);
      if (!is_alone(rank) && shutdown.ended < first_error(group)) {
        since = std::max(since, shutdown.ended);
      }
    }
    return since + seconds(plan_.host_timeout_s + 2 * period_s()) + kHeard +
           (event.when < kMet ? kStartUp : nanoseconds(0));
  }
  /// When anything of the group first raised; never: the end of time.
  nanoseconds first_error(int group) const {
    nanoseconds first = nanoseconds::max();
    for (const Listed& call : calls_) {
      if (call.group != group) continue;
      for (const int rank : call.ranks) {
        const Outcome& outcome = run_.outcome(rank, call.id);
        if (outcome.state == State::kRaised) first = std::min(first, outcome.ended);
      }
    }
    return first;
  }

  /// Exactly one thing happened: every error must be its.
  void the_error_is_that_of_the_fault(const Event& event) {
    for (const Listed& call : calls_) {
      if (!is_affected(call.group) || !was_made_everywhere(call.group)) continue;
      const int culprit = group_rank(call.group, event.rank);
      const std::string named = "rank " + std::to_string(culprit);
      for (const int rank : call.ranks) {
        const Outcome& outcome = run_.outcome(rank, call.id);
        if (outcome.state != State::kRaised || rank == event.rank) continue;
        const bool near = host_of(rank) == host_of(event.rank);
        const bool one_group = group_count() == 1;
        const bool on_one_host =
            std::all_of(members(call.group).begin(), members(call.group).end(),
                        [&](int member) { return host_of(member) == host_of(event.rank); });
        const auto require = [&](Error error, const std::string& part) {
          if (outcome.error == error && outcome.text.find(part) != std::string::npos) return;
          found_.push_back(where(rank, call) + "only rank " + std::to_string(event.rank) + " " +
                           simulation::name_of(event.kind) + ", and it raised " +
                           name_of(outcome.error) + " without \"" + part + "\": " + outcome.text);
        };
        // Other hosts have to be told, by who may look only once a period.
        const auto require_soon = [&] {
          const nanoseconds since = std::max(event.when, outcome.begun);
          const nanoseconds most = kHeard + (near ? nanoseconds(0) : seconds(2 * period_s()));
          if (outcome.ended - since <= most) return;
          found_.push_back(where(rank, call) + "heard " +
                           std::to_string((outcome.ended - since).count() / 1000000) +
                           " ms later that rank " + std::to_string(event.rank) + " " +
                           simulation::name_of(event.kind));
        };
        // A host is silent from the event on: it is lost, unless a deadline came first.
        const auto require_loss = [&](const std::string& part) {
          const bool was_due = outcome.error == Error::kTimeout &&
                               first_error(call.group) <= lost_by(event, call.group);
          if (!hosts_talk() || was_due) {
            require(Error::kTimeout, "timeout after");
          } else {
            require(Error::kPeerLost, part);
          }
        };
        switch (event.kind) {
          case Fault::Kind::kKill:
            if (near || (hosts_talk() && !is_alone(event.rank))) {
              require(Error::kPeerLost, "is gone");
              require_soon();
            } else if (outcome.text.find("is gone") == std::string::npos) {  // MPI has not told
              require_loss("no answer from host");
            }
            break;
          case Fault::Kind::kStop:
            if (is_alone(event.rank)) {
              if (one_group) require_loss("no answer from host");
            } else if (one_group) {
              require(Error::kTimeout, "timeout after");
            }
            break;
          case Fault::Kind::kPause:
            if (is_left_alone(event.rank, call.group) && outcome.error == Error::kPeerLost &&
                event.variant + 3000 * period_s() > 1000 * plan_.host_timeout_s) {
              require(Error::kPeerLost, "no answer from host");
            } else {
              require(Error::kTimeout, "timeout after");
            }
            break;
          case Fault::Kind::kCut:
            require_loss("no answer from host");
            break;
          case Fault::Kind::kAbort:
            if (near || hosts_talk()) {
              require(Error::kPeerLost, "rank " + std::to_string(event.rank) + " failed");
              require_soon();
            } else {
              require(Error::kTimeout, "timeout after");
            }
            break;
          case Fault::Kind::kInterrupt:
            if (near || hosts_talk()) {
              require(Error::kPeerLost, named + " was interrupted in");
              require_soon();
            }
            break;
          case Fault::Kind::kDiffer:
            if (call.id == event.call && !call.is_letter) require(Error::kMismatch, named);
            break;
          case Fault::Kind::kLeave:
            if (outcome.error == Error::kTimeout && another_can_send(event.rank, rank, call)) break;
            if (on_one_host) require(Error::kMismatch, "shutdown");
            break;
          case Fault::Kind::kSkip:
            if (on_one_host && one_group && !any_letters()) require(Error::kMismatch, named);
            break;
        }
      }
    }
    if (event.kind == Fault::Kind::kDiffer) the_receiver_compares(event);
    if (event.kind == Fault::Kind::kPause) short_pauses_harm_nobody(event);
  }

  bool any_letters() const {
    return std::any_of(calls_.begin(), calls_.end(),
                       [](const Listed& call) { return call.is_letter; });
  }

  void the_receiver_compares(const Event& event) {
    const auto call = std::find_if(calls_.begin(), calls_.end(),
                                   [&](const Listed& one) { return one.id == event.call; });
    if (!call->is_letter) return;
    const Outcome& outcome = run_.outcome(call->ranks[1], call->id);
    if (outcome.state == State::kRaised && outcome.error == Error::kMismatch) return;
    found_.push_back(where(call->ranks[1], *call) +
                     "the two ends differ, and the receiver did not say so: " + outcome.text);
  }

  void short_pauses_harm_nobody(const Event& event) {
    if (event.variant > 300) return;
    for (const Listed& call : calls_) {
      for (const int rank : call.ranks) {
        const Outcome& outcome = run_.outcome(rank, call.id);
        if (outcome.state != State::kRaised) continue;
        found_.push_back(where(rank, call) + "a pause of " + std::to_string(event.variant) +
                         " ms ended it: " + outcome.text);
      }
    }
  }

  const Run& run_;
  const Plan& plan_;
  std::vector<std::string>& found_;
  std::vector<Listed> calls_;
  std::vector<bool> affected_;
};

}  // namespace

void check_laws(const Run& run, std::vector<std::string>& found) { Laws(run, found).check(); }

}  // namespace simulation
