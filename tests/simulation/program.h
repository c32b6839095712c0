#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "group/group.h"
#include "run.h"

namespace simulation {

/// What one rank does: the steps of the plan, with what its faults make of them, then shutdown. An
/// error ends a call, not the program: the other groups must not notice.
class Program {
 public:
  Program(Run& run, int rank, pycomm::World& world);
  ~Program();

  void run();

  bool over() const { return over_; }
  int step() const { return step_; }
  int points = 0;                 // passed in this step
  bool interrupted = false;       // the next look for an interrupt finds one
  std::vector<Outcome> outcomes;  // by call; the last: shutdown
  std::vector<std::shared_ptr<pycomm::Group>> groups;

  /// Look at all results again: nobody may have written to them meanwhile.
  void check_results_again();
  /// Let go of the groups. Memory stays: what a killed rank had under way still uses it.
  void release();

 private:
  class Buffer;
  struct Issued;
  struct Awaited;

  void take_step(const Step& step);
  void make_group(const Step& step);
  void run_calls(const Step& step, pycomm::Group& group);
  void start_calls(const Step& step, pycomm::Group& group);
  void turn(const Step& step, pycomm::Group& group);
  void letter(const Step& step, pycomm::Group& group);
  void wait_for(Awaited& awaited);
  void wait_for_due(int step, int group);
  void shut_down();
  void compute(int microseconds);

  Call altered(const Step& step, const Call& call);
  Issued& issue(const Step& step, const Call& call, pycomm::Group& group);
  void check_result(const Issued& issued, const char* when);
  Outcome& begin(int id, int group);
  void succeed(Outcome& outcome, Issued* issued);
  /// With the exception being handled.
  void fail(Outcome& outcome, int group, const Issued* issued);
  /// What looks for an interrupt in waits.
  /// @param group  that an interrupt ends; -1: none.
  std::function<void()> interrupts(int group);

  Run& run_;
  const int rank_;
  pycomm::World& world_;
  int step_ = 0;
  bool over_ = false;
  const Fault* differs_ = nullptr;    // in this step
  std::vector<bool> failed_;          // by group
  std::vector<std::string> lasting_;  // by group: what a finished one raises
  std::vector<int> outstanding_;      // by group: calls
  std::deque<Issued> issued_;
  std::deque<Awaited> awaited_;
};

}  // namespace simulation
