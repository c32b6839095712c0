#include "program.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "core/error.h"
#include "group/post_office.h"
#include "group/turn.h"

namespace simulation {
namespace {

using pycomm::DType;
using pycomm::Group;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::ReduceOp;
using pycomm::Transfer;

/// Out of a wait, as Ctrl-C.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

/// Ends the program of a rank that was lost, after everything was checked.
struct Unwound {};

/// What rank `rank` brings to a call at position `i`: whole numbers up to 40, so that every sum of
/// five is exact in every dtype, and another call's are others.
int brought(int id, int rank, std::size_t i) {
  std::uint64_t hash = static_cast<std::uint64_t>(id) * 0x9e3779b97f4a7c15 +
                       static_cast<std::uint64_t>(rank) * 0xc2b2ae3d27d4eb4f + i;
  hash = (hash ^ (hash >> 29)) * 0xbf58476d1ce4e5b9;
  return static_cast<int>((hash >> 32) % 41);
}

void store(DType dtype, std::byte* at, int value) {
  const auto put = [&](auto number) { std::memcpy(at, &number, sizeof(number)); };
  switch (dtype) {
    case DType::kUint8:
      return put(static_cast<std::uint8_t>(value));
    case DType::kInt64:
      return put(static_cast<std::int64_t>(value));
    case DType::kFloat32:
      return put(static_cast<float>(value));
    default: {  // bfloat16 is the upper half of float32
      const auto number = static_cast<float>(value);
      std::uint32_t bits;
      std::memcpy(&bits, &number, sizeof(bits));
      return put(static_cast<std::uint16_t>(bits >> 16));
    }
  }
}

int folded(ReduceOp op, int id, int size, std::size_t i) {
  int result = brought(id, 0, i);
  for (int rank = 1; rank < size; ++rank) {
    const int value = brought(id, rank, i);
    result = op == ReduceOp::kSum   ? result + value
             : op == ReduceOp::kMax ? std::max(result, value)
                                    : std::min(result, value);
  }
  return result;
}

/// Elements from `from` to `to` of an uneven all_to_all; those of an all_gather do not depend on
/// `to`.
std::size_t block(const Call& call, int from, int to) {
  if (!call.uneven) return call.count;
  const int receiver = call.kind == Kind::kAllToAll ? to : 0;
  return call.count * static_cast<std::size_t>((from * 3 + receiver * 5 + call.id) % 4) / 3;
}

std::size_t sum_of_blocks(const Call& call, int size, int rank, bool outgoing) {
  std::size_t total = 0;
  for (int other = 0; other < size; ++other) {
    total += outgoing ? block(call, rank, other) : block(call, other, rank);
  }
  return total;
}

std::size_t input_count(const Call& call, int size, int rank) {
  const auto p = static_cast<std::size_t>(size);
  switch (call.kind) {
    case Kind::kBarrier:
      return 0;
    case Kind::kScatter:
    case Kind::kReduceScatter:
      return p * call.count;
    case Kind::kAllToAll:
      return sum_of_blocks(call, size, rank, /*outgoing=*/true);
    case Kind::kAllGather:
      return block(call, rank, 0);
    default:
      return call.count;
  }
}

std::size_t output_count(const Call& call, int size, int rank) {
  const auto p = static_cast<std::size_t>(size);
  switch (call.kind) {
    case Kind::kBarrier:
      return 0;
    case Kind::kGather:
      return p * call.count;
    case Kind::kAllToAll:
    case Kind::kAllGather:
      return sum_of_blocks(call, size, rank, /*outgoing=*/false);
    default:
      return call.count;
  }
}

bool works_in_place(const Call& call) {
  return call.kind == Kind::kBroadcast ||
         (call.in_place && (call.kind == Kind::kAllReduce || call.kind == Kind::kReduce));
}

bool has_result(const Call& call, int rank) {
  return (call.kind != Kind::kReduce && call.kind != Kind::kGather) || rank == call.root;
}

/// What a rank must find in its output, in order.
std::vector<int> expected(const Call& call, int size, int rank) {
  std::vector<int> values;
  const auto bring = [&](int from, std::size_t begin, std::size_t count) {
    for (std::size_t i = begin; i < begin + count; ++i) values.push_back(brought(call.id, from, i));
  };
  const auto me = static_cast<std::size_t>(rank);
  switch (call.kind) {
    case Kind::kAllReduce:
    case Kind::kReduce:
      for (std::size_t i = 0; i < call.count; ++i) {
        values.push_back(folded(call.op, call.id, size, i));
      }
      break;
    case Kind::kReduceScatter:
      for (std::size_t i = 0; i < call.count; ++i) {
        values.push_back(folded(call.op, call.id, size, me * call.count + i));
      }
      break;
    case Kind::kBroadcast:
      bring(call.root, 0, call.count);
      break;
    case Kind::kScatter:
      bring(call.root, me * call.count, call.count);
      break;
    case Kind::kAllGather:
    case Kind::kGather:
      for (int from = 0; from < size; ++from) bring(from, 0, block(call, from, 0));
      break;
    case Kind::kAllToAll:
      for (int from = 0; from < size; ++from) {
        std::size_t begin = 0;
        for (int to = 0; to < rank; ++to) begin += block(call, from, to);
        bring(from, begin, block(call, from, rank));
      }
      break;
    default:
      break;
  }
  return values;
}

}  // namespace

class Program::Buffer {
 public:
  Buffer(Group& group, std::size_t bytes, bool in_arena) : bytes_(bytes) {
    if (in_arena) {
      block_ = group.allocate(std::max<std::size_t>(1, bytes));
    } else {
      memory_.resize(bytes + 1);
    }
  }
  std::byte* data() { return block_ ? block_->data() : memory_.data(); }
  const std::byte* data() const { return block_ ? block_->data() : memory_.data(); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::vector<std::byte> memory_;
  std::shared_ptr<pycomm::ArenaBlock> block_;
};

/// A call with its memory, which is kept to the end of the run.
struct Program::Issued {
  Call call;
  int group_rank;
  int group_size;
  bool differs = false;
  Operation operation = {};
  std::vector<std::unique_ptr<Buffer>> memory = {};
  Buffer* output = nullptr;  // null: there is none
  std::vector<std::byte> before = {};
  std::vector<int> result = {};  // of a message: what must be there
  bool succeeded = false;
};

struct Program::Awaited {
  int due;  // before this step
  int group;
  int id;
  Issued* issued;
  std::shared_ptr<pycomm::Work> work;
  std::shared_ptr<pycomm::TransferWork> transfer;  // if it is one
};

Program::Program(Run& run, int rank, pycomm::World& world)
    : outcomes(static_cast<std::size_t>(run.plan_.calls) + 1),
      groups(run.plan_.groups.size()),
      run_(run),
      rank_(rank),
      world_(world),
      failed_(groups.size()),
      lasting_(groups.size()),
      outstanding_(groups.size()) {
  groups[0] = world.group();
}

Program::~Program() = default;

void Program::release() {
  awaited_.clear();
  groups.clear();
}

std::function<void()> Program::interrupts(int group) {
  return [this, group] {
    if (run_.ending_) throw Unwound();
    if (!std::exchange(interrupted, false)) return;
    // Now, since the rank may be lost before the call has raised.
    if (group >= 0) run_.note(Fault::Kind::kInterrupt, rank_, group);
    throw Interrupted();
  };
}

void Program::compute(int microseconds) {
  if (run_.ending_) throw Unwound();
  run_.machine_->yield();
  if (microseconds > 0) {
    run_.machine_->wait([] { return false; }, std::chrono::microseconds(microseconds));
  }
}

void Program::run() {
  try {
    const auto& steps = run_.plan_.steps;
    bool leaves = false;
    compute(run_.plan_.warm_up);
    for (step_ = 0; step_ < static_cast<int>(steps.size()); ++step_) {
      points = 0;
      const Step& step = steps[static_cast<std::size_t>(step_)];
      wait_for_due(step_, /*group=*/-1);
      if (run_.take(Fault::Kind::kAbort, rank_, step_) != nullptr) {
        run_.note(Fault::Kind::kAbort, rank_);
        world_.abort("rank " + std::to_string(rank_) + " failed: a deliberate error");
        wait_for_due(std::numeric_limits<int>::max(), /*group=*/-1);
        run_.network_->finalize(rank_);
        step_ = std::numeric_limits<int>::max();
        over_ = true;
        return;
      }
      if (run_.take(Fault::Kind::kLeave, rank_, step_) != nullptr) {
        run_.note(Fault::Kind::kLeave, rank_);
        leaves = true;
        break;
      }
      take_step(step);
    }
    if (!leaves) compute(run_.plan_.last_delays[static_cast<std::size_t>(rank_)]);
    step_ = static_cast<int>(steps.size());
    points = 0;
    wait_for_due(std::numeric_limits<int>::max(), /*group=*/-1);
    shut_down();
  } catch (const Unwound&) {
    // The rank was killed, and the run is over.
  } catch (const std::exception& error) {
    run_.found("rank " + std::to_string(rank_) + ", step " + std::to_string(step_) +
               ": the simulation itself failed: " + error.what());
  }
  step_ = std::numeric_limits<int>::max();
  over_ = true;
}

void Program::take_step(const Step& step) {
  const auto& members = run_.plan_.groups[static_cast<std::size_t>(step.group)];
  if (step.way == Step::Way::kMakeGroup) {
    compute(step.delays[static_cast<std::size_t>(rank_)]);
    if (run_.take(Fault::Kind::kSkip, rank_, step_) != nullptr) {
      return run_.note(Fault::Kind::kSkip, rank_, 0);
    }
    return make_group(step);
  }
  if (std::find(members.begin(), members.end(), rank_) == members.end()) return;
  const auto group = groups[static_cast<std::size_t>(step.group)];
  if (group == nullptr) return;  // it could not be made
  if (step.way == Step::Way::kDrop) {
    wait_for_due(std::numeric_limits<int>::max(), step.group);
    groups[static_cast<std::size_t>(step.group)] = nullptr;
    return;
  }
  if (step.calls.empty() && step.way != Step::Way::kLetter) return;
  compute(step.delays[static_cast<std::size_t>(rank_)]);
  if (run_.take(Fault::Kind::kSkip, rank_, step_) != nullptr) {
    return run_.note(Fault::Kind::kSkip, rank_, step.group);
  }
  if (step.way != Step::Way::kLetter || group->rank() == step.letter.from ||
      group->rank() == step.letter.to) {
    differs_ = run_.take(Fault::Kind::kDiffer, rank_, step_);
  }
  switch (step.way) {
    case Step::Way::kRun:
      return run_calls(step, *group);
    case Step::Way::kStart:
      return start_calls(step, *group);
    case Step::Way::kTurn:
      return turn(step, *group);
    case Step::Way::kLetter:
      return letter(step, *group);
    default:
      return;
  }
}

Outcome& Program::begin(int id, int group) {
  Outcome& outcome = outcomes[static_cast<std::size_t>(id)];
  outcome.state = Outcome::State::kBegun;
  outcome.issued = outcome.begun = run_.machine_->now();
  outcome.after_failure = failed_[static_cast<std::size_t>(group)];
  outcome.ahead = outstanding_[static_cast<std::size_t>(group)];
  return outcome;
}

void Program::succeed(Outcome& outcome, Issued* issued) {
  outcome.state = Outcome::State::kSucceeded;
  outcome.ended = run_.machine_->now();
  if (issued == nullptr) return;
  issued->succeeded = true;
  if (!issued->differs) check_result(*issued, "when it ended");
}

void Program::fail(Outcome& outcome, int group, const Issued* issued) {
  outcome.state = Outcome::State::kRaised;
  outcome.ended = run_.machine_->now();
  try {
    throw;
  } catch (const pycomm::MismatchError& error) {
    outcome.error = Outcome::Error::kMismatch;
    outcome.text = error.what();
  } catch (const pycomm::CommTimeoutError& error) {
    outcome.error = Outcome::Error::kTimeout;
    outcome.text = error.what();
  } catch (const pycomm::PeerLostError& error) {
    outcome.error = Outcome::Error::kPeerLost;
    outcome.text = error.what();
  } catch (const Interrupted& error) {
    outcome.error = Outcome::Error::kInterrupted;
    outcome.text = error.what();
  } catch (const std::exception& error) {
    outcome.error = Outcome::Error::kOther;
    outcome.text = error.what();
  }
  const auto at = static_cast<std::size_t>(group);
  if (outcome.after_failure) {
    if (lasting_[at].empty()) lasting_[at] = outcome.text;
    if (lasting_[at] != outcome.text) {
      run_.found("rank " + std::to_string(rank_) + ": a finished group raises another error: \"" +
                 outcome.text + "\" after \"" + lasting_[at] + "\"");
    }
  }
  failed_[at] = true;
  if (issued != nullptr && issued->output != nullptr) {
    outcome.untouched =
        std::equal(issued->before.begin(), issued->before.end(), issued->output->data());
  }
}

Call Program::altered(const Step& step, const Call& call) {
  if (differs_ == nullptr) return call;
  const int variant = std::exchange(differs_, nullptr)->variant;
  const auto size =
      static_cast<int>(run_.plan_.groups[static_cast<std::size_t>(step.group)].size());
  run_.note(Fault::Kind::kDiffer, rank_, step.group, call.id);
  Call other = call;
  const bool has_dtype = call.kind != Kind::kBarrier;
  const bool has_root = call.kind == Kind::kBroadcast || call.kind == Kind::kReduce ||
                        call.kind == Kind::kGather || call.kind == Kind::kScatter;
  if (variant == 0 && has_dtype && !call.uneven) {
    other.count += 1;
  } else if (variant == 1 && has_dtype) {
    other.dtype = call.dtype == DType::kInt64 ? DType::kFloat32 : DType::kInt64;
  } else if (variant == 2 && reduces(call.kind)) {
    other.op = call.op == ReduceOp::kSum ? ReduceOp::kMax : ReduceOp::kSum;
  } else if (variant == 3 && has_root && size > 1) {
    other.root = (call.root + 1) % size;
  } else if (variant == 4) {
    other.kind = call.kind == Kind::kAllReduce ? Kind::kBroadcast : Kind::kAllReduce;
    other.uneven = false;
    if (!has_dtype) other.dtype = DType::kInt64;
  } else {
    other.name += 1000;
  }
  return other;
}

Program::Issued& Program::issue(const Step& step, const Call& original, Group& group) {
  const bool differs = differs_ != nullptr && group.size() > 1;
  Issued& issued =
      issued_.emplace_back(Issued{altered(step, original), group.rank(), group.size(), differs});
  const Call& call = issued.call;
  const int size = group.size();
  const int rank = group.rank();
  const std::size_t element = size_of(call.dtype);
  const bool in_arena = (call.arenas >> rank_ & 1u) != 0;
  const std::size_t inputs = input_count(call, size, rank);
  const std::size_t outputs = output_count(call, size, rank);
  Operation& operation = issued.operation;
  operation.kind = call.kind;
  operation.dtype = call.dtype;
  operation.op = call.op;
  operation.algorithm = call.algorithm;
  operation.root = call.root;
  operation.count = call.kind == Kind::kAllGather ? block(call, rank, 0) : call.count;
  operation.name = "c" + std::to_string(call.name);
  operation.timeout_s = run_.plan_.timeouts[static_cast<std::size_t>(step.group)];
  if (call.uneven) {
    for (int other = 0; other < size; ++other) {
      if (call.kind == Kind::kAllToAll) {
        operation.input_counts.push_back(block(call, rank, other));
      }
      operation.output_counts.push_back(block(call, other, rank));
    }
  }
  auto input = std::make_unique<Buffer>(group, inputs * element, in_arena);
  for (std::size_t i = 0; i < inputs; ++i) {
    store(call.dtype, input->data() + i * element, brought(call.id, rank, i));
  }
  if (call.kind == Kind::kBroadcast && rank != call.root) {
    std::memset(input->data(), 0x3c, input->bytes());
  }
  operation.input = input->data();
  if (works_in_place(call)) {
    issued.output = input.get();
  } else {
    auto output = std::make_unique<Buffer>(group, outputs * element, in_arena);
    std::memset(output->data(), 0x3c, output->bytes());
    issued.output = output.get();
    issued.memory.push_back(std::move(output));
  }
  issued.memory.push_back(std::move(input));
  operation.output = issued.output->data();
  issued.before.assign(issued.output->data(), issued.output->data() + issued.output->bytes());
  if (has_result(call, rank)) issued.result = expected(call, size, rank);
  return issued;
}

void Program::check_result(const Issued& issued, const char* when) {
  const std::size_t element = size_of(issued.call.dtype);
  for (std::size_t i = 0; i < issued.result.size(); ++i) {
    std::byte value[8] = {};
    store(issued.call.dtype, value, issued.result[i]);
    if (std::memcmp(issued.output->data() + i * element, value, element) == 0) continue;
    return run_.found("rank " + std::to_string(rank_) + ": a wrong result without an error " +
                      when + ", element " + std::to_string(i) + " of " +
                      std::to_string(issued.result.size()) + ": " + issued.call.describe());
  }
}

void Program::check_results_again() {
  for (const Issued& issued : issued_) {
    if (issued.succeeded && !issued.differs) check_result(issued, "at the end of the run");
  }
}

void Program::make_group(const Step& step) {
  const auto& members = run_.plan_.groups[static_cast<std::size_t>(step.group)];
  Outcome& outcome = begin(step.calls.front().id, 0);
  try {
    groups[static_cast<std::size_t>(step.group)] = groups[0]->new_group(members, interrupts(0));
    succeed(outcome, nullptr);
  } catch (const Unwound&) {
    throw;
  } catch (...) {
    fail(outcome, 0, nullptr);
  }
}

void Program::run_calls(const Step& step, Group& group) {
  for (const Call& call : step.calls) {
    Issued& issued = issue(step, call, group);
    Outcome& outcome = begin(call.id, step.group);
    try {
      group.run(issued.operation, interrupts(step.group));
      succeed(outcome, &issued);
    } catch (const Unwound&) {
      throw;
    } catch (...) {
      fail(outcome, step.group, &issued);
    }
  }
}

void Program::start_calls(const Step& step, Group& group) {
  for (const Call& call : step.calls) {
    Issued& issued = issue(step, call, group);
    Outcome& outcome = begin(call.id, step.group);
    try {
      awaited_.push_back({step_ + step.linger, step.group, call.id, &issued,
                          group.start(issued.operation), nullptr});
      ++outstanding_[static_cast<std::size_t>(step.group)];
    } catch (const Unwound&) {
      throw;
    } catch (...) {
      fail(outcome, step.group, &issued);
    }
  }
}

void Program::turn(const Step& step, Group& group) {
  const auto turn = pycomm::Turn::take(group.shared_from_this());
  if (turn == nullptr) return run_calls(step, group);
  std::vector<Issued*> issued;
  for (const Call& call : step.calls) {
    issued.push_back(&issue(step, call, group));
    begin(call.id, step.group);
    turn->start(issued.back()->operation);
    compute(0);
    turn->advance();
    turn->check();
  }
  try {
    turn->wait(interrupts(step.group));
    for (std::size_t i = 0; i < issued.size(); ++i) {
      succeed(outcomes[static_cast<std::size_t>(step.calls[i].id)], issued[i]);
    }
  } catch (const Unwound&) {
    throw;
  } catch (...) {
    for (const Call& call : step.calls) {
      outcomes[static_cast<std::size_t>(call.id)].state = Outcome::State::kUnknown;
    }
    fail(outcomes[static_cast<std::size_t>(step.calls.back().id)], step.group, issued.back());
  }
}

void Program::letter(const Step& step, Group& group) {
  const Letter& letter = step.letter;
  const bool sends = group.rank() == letter.from;
  if (!sends && group.rank() != letter.to) return;
  Call what{letter.id};
  what.name = letter.id;
  what.kind = Kind::kBarrier;  // for Issued: a message is no collective
  what.dtype = letter.dtype;
  what.count = letter.count;
  const bool differs = differs_ != nullptr;
  if (differs) {
    const bool by_count = std::exchange(differs_, nullptr)->variant % 2 == 0;
    run_.note(Fault::Kind::kDiffer, rank_, step.group, letter.id);
    if (by_count) {
      what.count += 1;
    } else {
      what.dtype = letter.dtype == DType::kInt64 ? DType::kFloat32 : DType::kInt64;
    }
  }
  Issued& issued = issued_.emplace_back(Issued{what, group.rank(), group.size(), differs});
  const std::size_t element = size_of(what.dtype);
  issued.memory.push_back(std::make_unique<Buffer>(group, what.count * element, letter.in_arena));
  Buffer& memory = *issued.memory.front();
  for (std::size_t i = 0; i < what.count; ++i) {
    const int value = brought(letter.id, letter.from, i);
    if (sends) {
      store(what.dtype, memory.data() + i * element, value);
    } else {
      issued.result.push_back(value);
    }
  }
  if (!sends) {
    std::memset(memory.data(), 0x3c, memory.bytes());
    issued.output = &memory;
    issued.before.assign(memory.data(), memory.data() + memory.bytes());
  }
  Transfer transfer;
  transfer.direction = sends ? Transfer::Direction::kSend : Transfer::Direction::kReceive;
  transfer.peer = sends ? letter.to : letter.from_any ? Transfer::kAnySource : letter.from;
  transfer.tag = letter.id;
  transfer.dtype = what.dtype;
  transfer.count = what.count;
  transfer.memory = memory.data();
  const double timeout_s = run_.plan_.timeouts[static_cast<std::size_t>(step.group)];
  if (sends) issued.differs = false;  // it may be over before anybody compares
  Outcome& outcome = begin(letter.id, step.group);
  try {
    if (sends ? letter.starts_send : letter.starts_receive) {
      const auto work = group.post_office().start(transfer, timeout_s);
      awaited_.push_back({step_ + step.linger, step.group, letter.id, &issued, work, work});
      ++outstanding_[static_cast<std::size_t>(step.group)];
      return;
    }
    const int peer = group.post_office().run(transfer, timeout_s, interrupts(step.group));
    if (!sends && peer != letter.from) run_.found("a message from another rank");
    succeed(outcome, &issued);
  } catch (const Unwound&) {
    throw;
  } catch (...) {
    fail(outcome, step.group, &issued);
  }
}

void Program::wait_for(Awaited& awaited) {
  Outcome& outcome = outcomes[static_cast<std::size_t>(awaited.id)];
  const auto group = static_cast<std::size_t>(awaited.group);
  outcome.ahead = std::max(outcome.ahead, --outstanding_[group]);
  outcome.begun = run_.machine_->now();
  for (;;) {
    try {
      if (awaited.transfer != nullptr) {
        groups[group]->post_office().wait(*awaited.transfer, interrupts(-1));
      } else {
        awaited.work->wait(interrupts(-1));
      }
      return succeed(outcome, awaited.issued);
    } catch (const Unwound&) {
      throw;
    } catch (const Interrupted&) {
      // What was started goes on.
    } catch (...) {
      return fail(outcome, awaited.group, awaited.issued);
    }
  }
}

void Program::wait_for_due(int step, int group) {
  for (auto it = awaited_.begin(); it != awaited_.end();) {
    if (it->due > step || (group >= 0 && it->group != group)) {
      ++it;
      continue;
    }
    wait_for(*it);
    it = awaited_.erase(it);
  }
}

void Program::shut_down() {
  Outcome& outcome = begin(run_.plan_.calls, 0);
  // Its progress thread may have heard of a failure that no call of this rank has met.
  outcome.after_failure |= world_.group()->failed();
  // Not bound by the group's timeout: the others may be with a group that fails.
  const double timeout_s = 4 * run_.plan_.all_timeouts();
  try {
    world_.close(interrupts(0), timeout_s);
    succeed(outcome, nullptr);
  } catch (const Unwound&) {
    throw;
  } catch (...) {
    fail(outcome, 0, nullptr);
  }
  run_.network_->finalize(rank_);
}

}  // namespace simulation
