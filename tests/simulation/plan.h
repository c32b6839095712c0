#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/context.h"
#include "core/operation.h"
#include "machine.h"
#include "network.h"

namespace simulation {

/// One collective, the same on all ranks of its group but for a fault.
struct Call {
  int id;
  pycomm::Kind kind = pycomm::Kind::kBarrier;
  pycomm::DType dtype = pycomm::DType::kInt64;
  pycomm::ReduceOp op = pycomm::ReduceOp::kSum;
  pycomm::Algorithm algorithm = pycomm::Algorithm::kAuto;
  int root = 0;
  std::size_t count = 0;
  bool in_place = false;
  /// Bit r: rank r has its memory in the arena.
  unsigned arenas = 0;
  /// Blocks of all_gather and all_to_all have lengths of their own.
  bool uneven = false;
  int name = 0;  // what it is called; the id, but for a fault

  std::string describe() const;
};

/// One message between two ranks of a group.
struct Letter {
  int id;
  int from = 0;
  int to = 0;
  pycomm::DType dtype = pycomm::DType::kInt64;
  std::size_t count = 0;
  bool from_any = false;
  bool starts_send = false;  // rather than running it
  bool starts_receive = false;
  bool in_arena = false;
};

/// What every rank of a group does next; the others pass it by.
struct Step {
  enum class Way {
    kMakeGroup,  // the group's own first step: all ranks of the world
    kRun,        // one blocking call after the other
    kStart,      // all at once, waited for later
    kTurn,       // in one turn
    kLetter,
    kDrop,  // forget the group
  };
  Way way = Way::kRun;
  int group = 0;
  std::vector<Call> calls = {};
  int linger = 0;  // steps before what was started is waited for
  Letter letter = {};
  /// By world rank: how long it computes before, in microseconds.
  std::vector<int> delays = {};

  std::string describe() const;
};

struct Fault {
  enum class Kind {
    kKill,       // kill -9
    kStop,       // SIGSTOP
    kPause,      // SIGSTOP, and SIGCONT after a while
    kDiffer,     // makes another call
    kSkip,       // leaves one out
    kLeave,      // calls shutdown() instead
    kInterrupt,  // an exception out of a wait
    kAbort,      // an exception that nobody catches
    kCut,        // its host's cable is pulled
  };
  Kind kind;
  int rank;
  int step;
  int points;   // of the rank's in that step, before it happens
  int variant;  // kDiffer: in what; kPause: milliseconds

  std::string describe() const;
};
constexpr int kFaultKinds = 9;
const char* name_of(Fault::Kind kind);

/// A whole run: everything comes from the seed.
struct Plan {
  std::uint64_t seed;
  std::vector<int> hosts;
  std::vector<std::vector<int>> groups;  // world ranks; the first is the world
  std::vector<double> timeouts;          // by group, in seconds
  std::vector<Step> steps;
  std::vector<int> last_delays;  // by rank, before shutdown; in microseconds
  std::vector<Fault> faults;
  std::size_t piece_bytes;
  pycomm::Algorithm algorithm;
  Habits habits;
  Weather weather;
  double host_timeout_s = 0;  // 0: hosts tell each other nothing
  int warm_up = 0;            // before the first step, in microseconds: hosts hear each other
  int calls = 0;              // ids are below

  static Plan of(std::uint64_t seed);

  int size() const { return static_cast<int>(hosts.size()); }
  /// Seconds that a rank may spend with groups that fail.
  double all_timeouts() const;
  std::string describe() const;
};

/// What a minimised plan leaves out, as arguments that simulate takes.
struct Cuts {
  std::vector<int> steps;
  std::vector<int> faults;
  bool calm = false;  // no process is interrupted where it has shown something; no oversleep

  Plan apply(Plan plan) const;
  std::string arguments() const;
};

}  // namespace simulation
