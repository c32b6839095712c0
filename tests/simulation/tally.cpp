#include "tally.h"

#include <cstdio>

namespace simulation {

void Tally::add(const Run& run) {
  ++runs;
  if (run.events().empty()) ++quiet_runs;
  steps += run.machine().steps();
  messages += run.network().messages();
  for (const Event& event : run.events()) ++events[static_cast<std::size_t>(event.kind)];
  nanoseconds end{0};
  for (int id = 0; id <= run.plan().calls; ++id) {
    for (int rank = 0; rank < run.plan().size(); ++rank) {
      const Outcome& outcome = run.outcome(rank, id);
      end = std::max(end, outcome.ended);
      switch (outcome.state) {
        case Outcome::State::kNone:
        case Outcome::State::kUnknown:
          break;
        case Outcome::State::kBegun:
          ++calls;
          ++never_ended;
          break;
        case Outcome::State::kSucceeded:
          ++calls;
          ++exact;
          break;
        case Outcome::State::kRaised:
          ++calls;
          ++errors[static_cast<std::size_t>(outcome.error)];
          break;
      }
    }
  }
  simulated_ms += static_cast<std::uint64_t>(end.count() / 1000000);
}

std::string Tally::describe(double seconds) const {
  char line[200];
  std::string text;
  const auto add = [&](const char* name, std::uint64_t number) {
    std::snprintf(line, sizeof(line), "  %-28s %12llu\n", name,
                  static_cast<unsigned long long>(number));
    text += line;
  };
  std::snprintf(
      line, sizeof(line), "%llu schedules in %.1f s, %.0f a minute; %.1f simulated hours\n",
      static_cast<unsigned long long>(runs), seconds, static_cast<double>(runs) / seconds * 60,
      static_cast<double>(simulated_ms) / 3.6e6);
  text += line;
  add("steps", steps);
  add("messages between hosts", messages);
  add("without a fault", quiet_runs);
  text += "faults that came about\n";
  for (int kind = 0; kind < kFaultKinds; ++kind) {
    add(name_of(static_cast<Fault::Kind>(kind)), events[static_cast<std::size_t>(kind)]);
  }
  text += "calls, on each rank\n";
  add("exact result", exact);
  add("MismatchError", errors[0]);
  add("CommTimeoutError", errors[1]);
  add("PeerLostError", errors[2]);
  add("the interrupt", errors[3]);
  add("on ranks lost for ever", never_ended);
  return text;
}

}  // namespace simulation
