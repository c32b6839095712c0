#include "plan.h"

#include <algorithm>
#include <numeric>

#include "core/signature.h"

namespace simulation {
namespace {

using pycomm::Algorithm;
using pycomm::DType;
using pycomm::Kind;
using pycomm::ReduceOp;

const std::vector<std::vector<int>> kPlacements = {
    {0, 0},    {0, 0, 0},    {0, 0, 0, 0}, {0, 1},       {0, 0, 1},       {0, 1, 2},
    {0, 1, 0}, {0, 0, 1, 1}, {0, 0, 0, 1}, {0, 1, 0, 1}, {0, 1, 2, 0},    {0, 0, 1, 1, 2},
    {0, 1, 1}, {1, 0, 0, 0}, {0, 0, 1, 2}, {0, 1, 2, 3}, {0, 0, 0, 0, 0}, {0, 1, 0, 1, 1}};

std::size_t draw_count(Random& random) {
  switch (random.below(8)) {
    case 0:
      return 0;
    case 1:
      return static_cast<std::size_t>(random.between(1, 5));
    case 2:
    case 3:
    case 4:
      return static_cast<std::size_t>(random.between(6, 300));
    case 5:
    case 6:
      return static_cast<std::size_t>(random.between(301, 2500));
    default:
      return static_cast<std::size_t>(random.between(2501, 9000));
  }
}

Call draw_call(Random& random, int id, int group_size) {
  Call call{id};
  call.name = id;
  call.kind = random.one_of({Kind::kAllReduce, Kind::kAllReduce, Kind::kAllReduce, Kind::kBroadcast,
                             Kind::kAllGather, Kind::kReduce, Kind::kGather, Kind::kScatter,
                             Kind::kReduceScatter, Kind::kAllToAll, Kind::kBarrier});
  if (call.kind == Kind::kBarrier) return call;
  call.dtype = random.one_of({DType::kInt64, DType::kFloat32, DType::kBFloat16, DType::kUint8});
  if (reduces(call.kind)) call.op = random.one_of({ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin});
  if (call.kind == Kind::kAllReduce) {
    call.algorithm = random.one_of({Algorithm::kAuto, Algorithm::kAuto, Algorithm::kDirect,
                                    Algorithm::kRing, Algorithm::kGatherFold});
  }
  call.root = random.below(group_size);
  call.count = draw_count(random);
  call.in_place = random.chance(0.7);
  call.arenas = random.one_of({0u, ~0u, ~0u, static_cast<unsigned>(random.below(32))});
  call.uneven =
      (call.kind == Kind::kAllToAll || call.kind == Kind::kAllGather) && random.chance(0.4);
  return call;
}

Step draw_step(Random& random, const Plan& plan, int& next_id) {
  Step step;
  step.group = random.below(static_cast<int>(plan.groups.size()));
  const auto size = static_cast<int>(plan.groups[static_cast<std::size_t>(step.group)].size());
  step.way = random.one_of(
      {Step::Way::kRun, Step::Way::kRun, Step::Way::kStart, Step::Way::kTurn, Step::Way::kLetter});
  if (step.way == Step::Way::kLetter && size == 1) step.way = Step::Way::kRun;
  for (int rank = 0; rank < plan.size(); ++rank) {
    step.delays.push_back(random.one_of({0, 0, 0, random.below(300), random.below(20000)}));
  }
  if (step.way == Step::Way::kLetter) {
    Letter& letter = step.letter;
    letter.id = next_id++;
    letter.from = random.below(size);
    letter.to = (letter.from + random.between(1, size - 1)) % size;
    letter.dtype = random.one_of({DType::kInt64, DType::kFloat32, DType::kUint8});
    letter.count = random.chance(0.15) ? static_cast<std::size_t>(random.between(9000, 40000))
                                       : draw_count(random);
    letter.from_any = random.chance(0.2);
    letter.starts_send = random.chance(0.5);
    letter.starts_receive = random.chance(0.5);
    letter.in_arena = random.chance(0.4);
  } else {
    const int calls = step.way == Step::Way::kRun ? random.between(1, 2) : random.between(1, 4);
    for (int i = 0; i < calls; ++i) step.calls.push_back(draw_call(random, next_id++, size));
  }
  step.linger = random.between(0, 3);
  return step;
}

Fault draw_fault(Random& random, const Plan& plan) {
  Fault fault{};
  fault.kind = static_cast<Fault::Kind>(random.below(kFaultKinds));
  fault.rank = random.below(plan.size());
  fault.step = random.below(static_cast<int>(plan.steps.size()));
  fault.points = random.one_of({0, 1, 2, random.below(10), random.below(60)});
  fault.variant =
      fault.kind == Fault::Kind::kPause ? random.one_of({5, 300, 3000, 20000}) : random.below(6);
  return fault;
}

std::string text_of(const std::vector<int>& numbers) {
  std::string text;
  for (const int number : numbers) text += (text.empty() ? "" : ",") + std::to_string(number);
  return text;
}

}  // namespace

Plan Plan::of(std::uint64_t seed) {
  Random random(seed);
  Plan plan{};
  plan.seed = seed;
  plan.hosts = kPlacements[random.below(kPlacements.size())];
  plan.piece_bytes = random.one_of<std::size_t>({1024, 1024, 4096, 16384});
  plan.algorithm = random.one_of(
      {Algorithm::kAuto, Algorithm::kAuto, Algorithm::kDirect, Algorithm::kGatherFold});
  plan.habits.order =
      random.one_of({Habits::Order::kUniform, Habits::Order::kBursts, Habits::Order::kPriorities});
  plan.habits.step = nanoseconds(random.one_of({1'000, 10'000, 60'000}));
  plan.habits.interleave = random.one_of({0.0, 0.1, 0.3, 0.9});
  plan.habits.oversleep = random.one_of({0.0, 0.1, 0.5});
  plan.weather.latency = nanoseconds(random.one_of({1'000, 20'000, 200'000}));
  plan.weather.spread = plan.weather.latency > nanoseconds(100'000) ? random.one_of({1, 4})
                                                                    : random.one_of({1, 4, 40});
  plan.weather.eager_bytes = random.one_of<std::size_t>({64, 1024, 4096, 65536});
  plan.weather.held = random.one_of({0.0, 0.2, 0.8});
  plan.weather.tells_of_deaths = random.chance(0.5);

  std::vector<int> world(plan.hosts.size());
  std::iota(world.begin(), world.end(), 0);
  plan.groups.push_back(world);
  const int more_groups = random.one_of({0, 0, 1, 2});
  for (int i = 0; i < more_groups; ++i) {
    std::vector<int> members;
    for (const int rank : world) {
      if (random.chance(0.7)) members.push_back(rank);
    }
    if (members.empty()) members.push_back(random.below(plan.size()));
    if (random.chance(0.3)) std::reverse(members.begin(), members.end());
    plan.groups.push_back(members);
    Step step;
    step.way = Step::Way::kMakeGroup;
    step.group = i + 1;
    step.calls.push_back(Call{plan.calls++});
    step.delays.assign(plan.hosts.size(), 0);
    plan.steps.push_back(step);
  }
  // Where each step of a rank takes 60 us, the longest call was seen to need 2.1 s.
  double timeout_s = plan.habits.step > nanoseconds(10'000) ? 4 : 2;
  for (std::size_t i = 0; i < plan.groups.size(); ++i, timeout_s *= 4) {
    plan.timeouts.push_back(timeout_s);
  }
  const int steps = random.between(2, 9);
  for (int i = 0; i < steps; ++i) plan.steps.push_back(draw_step(random, plan, plan.calls));
  if (more_groups > 0 && random.chance(0.3)) {
    Step drop;
    drop.way = Step::Way::kDrop;
    drop.group = 1;
    drop.delays.assign(plan.hosts.size(), 0);
    plan.steps.push_back(drop);
    const int after = random.between(0, 3);
    for (int i = 0; i < after; ++i) {
      Step step = draw_step(random, plan, plan.calls);
      if (step.group != 1) plan.steps.push_back(step);
    }
  }
  // Who has sent the last message may do something else for longer than its receiver would wait.
  plan.last_delays.assign(plan.hosts.size(), 0);
  const Step& last = plan.steps.back();
  if (last.way == Step::Way::kLetter && random.chance(0.5)) {
    const auto& ranks = plan.groups[static_cast<std::size_t>(last.group)];
    const auto sender = static_cast<std::size_t>(ranks[static_cast<std::size_t>(last.letter.from)]);
    plan.last_delays[sender] =
        static_cast<int>(1.5e6 * plan.timeouts[static_cast<std::size_t>(last.group)]);
  }
  const int faults = random.one_of({0, 1, 1, 1, 1, 1, 2, 2, 3});
  for (int i = 0; i < faults; ++i) plan.faults.push_back(draw_fault(random, plan));
  plan.host_timeout_s = random.one_of({0.0, 1.5, 4.0, 10.0});
  plan.warm_up = random.one_of({0, 300'000});
  return plan;
}

double Plan::all_timeouts() const { return std::accumulate(timeouts.begin(), timeouts.end(), 0.0); }

const char* name_of(Fault::Kind kind) {
  switch (kind) {
    case Fault::Kind::kKill:
      return "killed";
    case Fault::Kind::kStop:
      return "stopped";
    case Fault::Kind::kPause:
      return "paused";
    case Fault::Kind::kDiffer:
      return "calls something else";
    case Fault::Kind::kSkip:
      return "skips a step";
    case Fault::Kind::kLeave:
      return "leaves";
    case Fault::Kind::kInterrupt:
      return "interrupted";
    case Fault::Kind::kAbort:
      return "ends the job";
    case Fault::Kind::kCut:
      return "host cut off";
  }
  return "";
}

std::string Call::describe() const {
  return "#" + std::to_string(id) + " " + pycomm::name_of(kind) + " of " + std::to_string(count) +
         " " + pycomm::name_of(dtype) + " " + pycomm::name_of(op) + " root " +
         std::to_string(root) + " " + pycomm::name_of(algorithm) + (in_place ? ", in place" : "") +
         (uneven ? ", uneven" : "") + ", arenas " + std::to_string(arenas & 31u);
}

std::string Step::describe() const {
  std::string text = "group " + std::to_string(group) + ": ";
  switch (way) {
    case Way::kMakeGroup:
      return text + "make it";
    case Way::kDrop:
      return text + "drop it";
    case Way::kLetter:
      return text + "#" + std::to_string(letter.id) + (letter.starts_send ? " isend" : " send") +
             " from " + std::to_string(letter.from) + " to " + std::to_string(letter.to) +
             (letter.starts_receive ? " irecv" : " recv") + (letter.from_any ? " from any" : "") +
             " of " + std::to_string(letter.count) + " " + pycomm::name_of(letter.dtype);
    case Way::kRun:
      text += "run";
      break;
    case Way::kStart:
      text += "start, and wait " + std::to_string(linger) + " steps later,";
      break;
    case Way::kTurn:
      text += "in a turn";
      break;
  }
  for (const Call& call : calls) text += "\n      " + call.describe();
  return text;
}

std::string Fault::describe() const {
  return "rank " + std::to_string(rank) + " " + name_of(kind) + " at point " +
         std::to_string(points) + " of step " + std::to_string(step) + " (variant " +
         std::to_string(variant) + ")";
}

std::string Plan::describe() const {
  std::string text =
      "seed " + std::to_string(seed) + ": hosts " + text_of(hosts) + "; pieces of " +
      std::to_string(piece_bytes) + " bytes; algorithm " + pycomm::name_of(algorithm) + "; order " +
      std::to_string(static_cast<int>(habits.order)) + ", step " +
      std::to_string(habits.step.count()) + " ns, interleave " + std::to_string(habits.interleave) +
      "; latency " + std::to_string(weather.latency.count()) + " ns x " +
      std::to_string(weather.spread) + ", eager " + std::to_string(weather.eager_bytes) +
      ", held " + std::to_string(weather.held) +
      (weather.tells_of_deaths ? ", tells of deaths" : "") + "; hosts lost after " +
      std::to_string(host_timeout_s) + " s, begin after " + std::to_string(warm_up) + " us\n";
  for (std::size_t i = 0; i < groups.size(); ++i) {
    text += "  group " + std::to_string(i) + ": ranks " + text_of(groups[i]) + ", timeout " +
            std::to_string(timeouts[i]) + " s\n";
  }
  for (std::size_t i = 0; i < steps.size(); ++i) {
    text += "  step " + std::to_string(i) + ", " + steps[i].describe() + "\n";
  }
  for (std::size_t i = 0; i < faults.size(); ++i) {
    text += "  fault " + std::to_string(i) + ": " + faults[i].describe() + "\n";
  }
  return text;
}

Plan Cuts::apply(Plan plan) const {
  // Emptied, not removed: the numbers that faults and people use stay.
  for (const int step : steps) {
    plan.steps[static_cast<std::size_t>(step)].calls.clear();
    plan.steps[static_cast<std::size_t>(step)].way = Step::Way::kRun;
  }
  std::vector<Fault> kept;
  for (int i = 0; i < static_cast<int>(plan.faults.size()); ++i) {
    if (std::find(faults.begin(), faults.end(), i) == faults.end()) {
      kept.push_back(plan.faults[static_cast<std::size_t>(i)]);
    }
  }
  plan.faults = kept;
  if (calm) {
    plan.habits.interleave = 0;
    plan.habits.oversleep = 0;
  }
  return plan;
}

std::string Cuts::arguments() const {
  std::string text;
  if (!steps.empty()) text += " --without-steps " + text_of(steps);
  if (!faults.empty()) text += " --without-faults " + text_of(faults);
  if (calm) text += " --calm";
  return text;
}

}  // namespace simulation
