#include "group/group.h"

#include <algorithm>
#include <array>
#include <new>
#include <numeric>
#include <utility>

#include "collectives/immediate.h"
#include "core/error.h"
#include "core/fork_guard.h"
#include "core/rank_list.h"
#include "core/signature.h"
#include "group/backoff.h"
#include "group/process.h"
#include "nccl/drain.h"

namespace pycomm {
namespace {

constexpr std::size_t kPageBytes =
    (sizeof(GroupPage) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;

/// How every rank of a host divides its memory for a group; offsets in bytes.
struct Division {
  Division(const Staging& staging, int host_count, int local_size)
      : early(kPageBytes + staging.bytes(host_count)),
        mail(early + staging.early_bytes()),
        end(mail + PostOffice::bytes(local_size)) {}

  static constexpr std::size_t kStaging = kPageBytes;
  const std::size_t early;
  const std::size_t mail;
  const std::size_t end;
};

/// Which members share hosts, in group ranks.
Placement placement_of(const Process& process, const std::vector<int>& ranks) {
  std::vector<std::string> keys;
  for (const int rank : ranks) {
    keys.push_back(std::to_string(process.placement.host_of[static_cast<std::size_t>(rank)]));
  }
  return Placement::of(keys);
}

NoticeKind kind_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const MismatchError&) {
    return NoticeKind::kMismatch;
  } catch (const CommTimeoutError&) {
    return NoticeKind::kTimeout;
  } catch (...) {
    return NoticeKind::kPeerLost;
  }
}

/// Errors of MPI, CUDA, NCCL and a GPU's memory know of no call: who made one says which.
bool knows_no_call(const std::string& text) {
  constexpr std::array beginnings{Channel::kFailure, "CUDA: ", "NCCL: ", "GPU "};
  return std::ranges::any_of(beginnings, [&](const char* it) { return text.starts_with(it); });
}

/// The error with another text, if it is one of those that finish a group; else as it is.
std::exception_ptr with_text(const std::exception_ptr& error, const std::string& text) {
  try {
    std::rethrow_exception(error);
  } catch (const MismatchError&) {
    return std::make_exception_ptr(MismatchError(text));
  } catch (const CommTimeoutError&) {
    return std::make_exception_ptr(CommTimeoutError(text));
  } catch (const PeerLostError&) {
    return std::make_exception_ptr(PeerLostError(text));
  } catch (const InvalidArgumentError&) {
    return error;
  } catch (const CommError&) {
    return std::make_exception_ptr(CommError(text));
  } catch (...) {
    return error;
  }
}

/// Members share no other group's tag.
std::uint64_t id_of(int tag, const std::vector<int>& ranks) {
  std::uint64_t id = static_cast<std::uint64_t>(tag) + 1;
  for (const int rank : ranks) {  // FNV-1a, by words
    id = (id ^ (static_cast<std::uint64_t>(rank) + 1)) * 0x100000001B3u;
  }
  return id;
}

/// For the other ranks: what came out of the call there was not our error.
std::string interrupted_in(const std::string& call, int rank) {
  return "rank " + std::to_string(rank) + " was interrupted in " + call +
         ", by Ctrl-C or an exception.\n  It cannot take part any more, so the group is over. Read "
         "that rank's log first, then start the job again.";
}

/// What is wrong with blocks of given lengths, of which there is one for each rank, mine as long as
/// what I bring; empty: nothing.
std::string problem_of_counts(const Operation& operation, int rank, int size) {
  const bool exchanges = operation.kind == Kind::kAllToAll;
  const bool gathers = operation.kind == Kind::kAllGather || operation.kind == Kind::kGather;
  if ((!operation.input_counts.empty() && !exchanges) ||
      (!operation.output_counts.empty() && !exchanges && !gathers)) {
    return "all its blocks have one length. Pass `count` alone.";
  }
  for (const auto& [name, counts] : {std::pair{"input_counts", &operation.input_counts},
                                     std::pair{"output_counts", &operation.output_counts}}) {
    if (!counts->empty() && counts->size() != static_cast<std::size_t>(size)) {
      return std::string(name) + " has " + std::to_string(counts->size()) + " entries, the group " +
             std::to_string(size) + " ranks. Pass one for each rank.";
    }
  }
  if (!gathers || operation.output_counts.empty()) return "";
  const std::size_t mine = operation.output_counts[static_cast<std::size_t>(rank)];
  if (operation.count == mine) return "";
  return "this rank brings " + std::to_string(operation.count) + " elements, and output_counts[" +
         std::to_string(rank) + "] is " + std::to_string(mine) + ". Pass the same number twice.";
}

/// A line for errors, which name ranks of the group: which ranks of the job they are. Empty if they
/// are the same.
std::string describe_ranks(const std::vector<int>& ranks) {
  std::vector<int> own(ranks.size());
  std::iota(own.begin(), own.end(), 0);
  if (ranks == own) return "";
  constexpr std::size_t kMost = 16;
  return "\n  Ranks " + rank_list(own, kMost) + " of this group are ranks " +
         rank_list(ranks, kMost) + " of the job; what is said of other hosts names those.";
}

}  // namespace

std::shared_ptr<Group> Group::create(
    std::shared_ptr<Process> process, std::vector<int> ranks,
    const std::function<std::vector<GroupRecord>(const GroupRecord&)>& gather, double timeout_s) {
  Placement placement = placement_of(*process, ranks);
  const auto member = static_cast<std::size_t>(
      std::find(ranks.begin(), ranks.end(), process->rank) - ranks.begin());
  const auto& locals = placement.hosts[static_cast<std::size_t>(placement.host_of[member])];
  const auto local_size = static_cast<int>(locals.size());
  const Division division(process->options.staging, placement.host_count(), local_size);
  const auto memory = process->allocate(division.end);
  new (memory->data()) GroupPage();
  PostOffice::prepare_memory(memory->data() + division.mail, local_size);
  const auto arena_of = [&](int group_rank) -> const Arena& {
    const int world_rank = ranks[static_cast<std::size_t>(group_rank)];
    const int local = process->placement.local_rank_of[static_cast<std::size_t>(world_rank)];
    return *process->local_arenas[static_cast<std::size_t>(local)];
  };
  std::vector<GroupRecord> records;
  std::int64_t tag = 0;
  {
    const auto only_one = process->begin_group();
    try {
      records = gather({memory->offset(), process->free_tag.load()});
      for (int rank = 0; rank < static_cast<int>(ranks.size()); ++rank) {
        const bool is_here = std::find(locals.begin(), locals.end(), rank) != locals.end();
        records[static_cast<std::size_t>(rank)].check(
            rank, is_here ? arena_of(rank).reserve_bytes() : 0, division.end);
      }
    } catch (...) {
      ArenaBlock::quarantine(memory);  // the other members may have built their group on it
      throw;
    }
    for (const GroupRecord& record : records) tag = std::max(tag, record.free_tag);
    process->free_tag = tag + kTagsOfAGroup;
  }

  std::vector<Window::Peer> peers;
  for (const int group_rank : locals) {
    const auto at = static_cast<std::size_t>(group_rank);
    const Arena& arena = arena_of(group_rank);
    std::byte* const page = arena.base() + records[at].page_offset;
    peers.push_back({&Process::page_of(arena), &arena, reinterpret_cast<GroupPage*>(page),
                     page + Division::kStaging, page + division.early, page + division.mail,
                     group_rank});
  }
  Window window(placement.local_rank_of[member], std::move(peers),
                division.early - Division::kStaging, process->job_notice());
  if (timeout_s <= 0) timeout_s = process->options.timeout_s;
  return std::shared_ptr<Group>(new Group(std::move(process), std::move(ranks),
                                          static_cast<int>(member), std::move(placement), memory,
                                          std::move(window), static_cast<int>(tag), timeout_s));
}

Group::Group(std::shared_ptr<Process> process, std::vector<int> ranks, int rank,
             Placement placement, std::shared_ptr<ArenaBlock> memory, Window window, int tag,
             double timeout_s)
    : process_(std::move(process)),
      ranks_(std::move(ranks)),
      placement_(std::move(placement)),
      memory_(std::move(memory)),
      window_(std::move(window)),
      context_{window_,
               process_->channel.get(),
               tag,
               placement_,
               ranks_,
               *process_->arena,
               process_->options.staging,
               process_->options.tuning,
               rank},
      timeout_s_(timeout_s),
      journal_(process_->page().recorder, tag, ranks_, process_->size),
      id_(id_of(tag, ranks_)) {
  process_->enrol(*this);
}

Group::~Group() {
  if (in_forked_child()) {
    static_cast<void>(gpus_.release());  // CUDA does not survive a fork
    return;
  }
  process_->roster()->strike(*this);
  window_.leave();
  if (failure_ && placement_.host_count() > 1) {
    ArenaBlock::quarantine(memory_);  // MPI may still send from it, or receive into it
  } else {
    process_->retire(memory_, [window = window_] { return window.all_left(); });
  }
}

void Group::refuse(const Operation& operation, const std::string& problem) const {
  throw InvalidArgumentError(std::string(name_of(operation.kind)) + " on rank " +
                             std::to_string(rank()) + ": " + problem);
}

void Group::prepare(Operation& operation) {
  if (in_forked_child()) {
    throw CommError(std::string(name_of(operation.kind)) +
                    ": this process was forked from a rank and is not one itself. Communicate in "
                    "the parent, or start workers with the 'spawn' method and call pycomm.init().");
  }
  if (operation.root < 0 || operation.root >= size()) {
    refuse(operation, "root is " + std::to_string(operation.root) + ", the group has ranks 0 to " +
                          std::to_string(size() - 1) + ".");
  }
  if (const auto problem = problem_of_counts(operation, rank(), size()); !problem.empty()) {
    refuse(operation, problem);
  }
  if (reduces(operation.kind)) {
    if (!can_reduce(operation.dtype, operation.op)) {
      refuse(operation, std::string("dtype ") + name_of(operation.dtype) +
                            " cannot be reduced with " + name_of(operation.op) + ".");
    }
    if (operation.op == ReduceOp::kAvg && operation.divisor == 0) operation.divisor = size();
    if (operation.divisor < 0 || (operation.divisor > 1 && !is_scalable(operation.dtype))) {
      refuse(operation, "divisor " + std::to_string(operation.divisor) +
                            " needs a floating or complex dtype and must be positive.");
    }
    if ((operation.prescale != 1 || operation.postscale != 1) && !is_scalable(operation.dtype)) {
      refuse(operation, std::string("a factor needs a floating or complex dtype, and this is ") +
                            name_of(operation.dtype) + ".");
    }
  }
  if (operation.timeout_s <= 0) operation.timeout_s = timeout_s_;
  operation.warn_after_s = process_->options.warn_after_s;
  issuer_.store(thread_number(), std::memory_order_relaxed);
  if (operation.device >= 0) process_->gpu_plane().issue(operation);
}

std::shared_ptr<Work> Group::start(Operation operation) {
  prepare(operation);
  return enqueue(std::move(operation));
}

std::shared_ptr<Work> Group::enqueue(Operation operation) {
  auto work = std::make_shared<Work>(process_->page().doorbell, operation.device_call);
  work->is_call_of(process_->roster(), context_.tag);
  {
    std::lock_guard lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
    const auto entry = journal_.queue(operation);
    queue_.push_back({std::move(operation), work, entry});
    ++queued_;
    // Acquire-release, as all changes: who sees kRunning may leave the queue to that thread.
    if (state_.fetch_or(kQueued, std::memory_order_acq_rel) != 0) return work;
  }
  submit();
  return work;
}

void Group::submit() {
  try {
    process_->submit(shared_from_this());
  } catch (...) {
    abandon();  // nobody will ever take what is queued
    throw;
  }
}

bool Group::begin_turn() {
  unsigned idle = 0;
  return placement_.host_count() == 1 && !process_->stopped() &&
         state_.compare_exchange_strong(idle, kRunning, std::memory_order_acq_rel);
}

void Group::end_turn() {
  if (state_.fetch_and(~kRunning, std::memory_order_acq_rel) & kQueued) submit();
}

void Group::run(Operation operation, const InterruptCheck& check_interrupt,
                const std::function<void()>& before_waiting) {
  prepare(operation);
  if (operation.device < 0 && begin_turn()) {
    count_in_turn();
    run_here(operation, check_interrupt, before_waiting);
  } else {
    if (before_waiting) before_waiting();
    run_there(std::move(operation), check_interrupt);
  }
}

void Group::run_here(const Operation& operation, const InterruptCheck& check_interrupt,
                     const std::function<void()>& before_waiting) {
  const auto entry = journal_.begin(operation, context_);
  std::exception_ptr error;
  try {
    if (!is_immediate(context_, operation) ||
        !run_immediately(context_, operation, process_->may_spin)) {
      if (before_waiting) before_waiting();
      drive(operation, entry, check_interrupt);
    }
  } catch (...) {
    error = fail(describe_call(context_, operation));
    keep_output_of(operation);
  }
  journal_.end(entry, context_, error != nullptr);
  try {
    end_turn();
  } catch (const CommError&) {
    if (!error) throw;
  }
  if (error) std::rethrow_exception(error);
}

void Group::drive(const Operation& operation, Journal::Entry entry,
                  const InterruptCheck& check_interrupt) {
  Execution execution(context_, operation);
  journal_.start(entry, context_);
  Roster::Waiting waiting(process_->roster().get(), context_.tag);
  Backoff(window_.doorbell(), process_->may_spin)
      .drive([&] { return execution.done(); }, [&] { return execution.advance(); },
             [&] {
               waiting.slept();
               execution.check();
               process_->roster()->check(*this, execution.seconds());
               check_interrupt();
             });
  execution.finish();
}

void Group::run_there(Operation operation, const InterruptCheck& check_interrupt) {
  const std::string call = name_of(operation.kind);
  const StreamAddress stream = operation.stream;
  const auto work = enqueue(std::move(operation));
  std::exception_ptr interrupt;
  try {
    work->wait([&] {
      try {
        check_interrupt();
      } catch (...) {
        interrupt = std::current_exception();
        throw;
      }
    });
  } catch (...) {
    if (!interrupt) throw;
    // The operation must not outlive the caller's memory: end it, then go.
    abort(interrupted_in(call, rank()));
    try {
      work->wait([] {});
    } catch (const CommError&) {
      // the abort itself
    }
    std::rethrow_exception(interrupt);
  }
  if (work->device_call() != nullptr) work->device_call()->order_before(stream);
}

Progressive::State Group::advance() {
  watch_gpus();
  const State nothing = gpus_busy() ? State::kPolling : State::kIdle;
  if (!current_) {
    std::exception_ptr failure;
    {
      std::lock_guard lock(mutex_);
      if (queue_.empty()) return nothing;
      // A caller's thread whose turn it is submits the queue when it has ended.
      if (state_.fetch_or(kRunning, std::memory_order_acq_rel) & kRunning) return nothing;
      pending_ = std::move(queue_.front());
      queue_.pop_front();
      if (queue_.empty()) state_.fetch_and(~kQueued, std::memory_order_acq_rel);
      failure = failure_;
    }
    if (failure) {
      end_current(failure);  // issued before the failure, never begun
      return State::kAdvanced;
    }
    if (pending_.operation.device >= 0 && gpus_ == nullptr) {
      gpus_ = process_->gpu_plane().join(static_cast<std::uint64_t>(context_.tag));
    }
    current_.emplace(context_, pending_.operation, gpus_.get());
    journal_.start(pending_.entry, context_);
    if (!current_->done()) return State::kAdvanced;
  }
  try {
    if (!current_->advance()) {
      return current_->rings_doorbell() && !gpus_busy() ? State::kWaiting : State::kPolling;
    }
    if (current_->done()) {
      current_->finish();
      end_current(nullptr);
    }
  } catch (...) {
    end_current_with_error();
  }
  return State::kAdvanced;
}

void Group::check() {
  if (current_) {
    try {
      check_current();
    } catch (...) {
      end_current_with_error();
    }
  }
  if (!gpus_busy()) return;
  const std::string call = describe_gpu_call();
  try {
    check_peers(window_, call);
    check_other_hosts([&] { return call; });
  } catch (...) {
    fail(call);  // watch_gpus() aborts
  }
}

void Group::check_current() {
  try {
    current_->check();
  } catch (const CommTimeoutError& error) {
    throw CommTimeoutError(error.what() + process_->remark_on(ranks_));
  }
  check_other_hosts([&] { return current_->describe(); });
  process_->roster()->check(*this, current_->seconds());
}

void Group::check_other_hosts(const std::function<std::string()>& call) const {
  if (!spans_hosts()) return;
  const std::string loss = process_->loss_among(ranks_);
  if (!loss.empty()) throw PeerLostError(call() + ": " + loss);
}

Standing::Use Group::use() const {
  Standing::Use use;
  use.group = id_;
  use.thread = issuer_.load(std::memory_order_relaxed);
  std::lock_guard lock(mutex_);
  use.issued = queued_ + run_in_turns_.load(std::memory_order_relaxed);
  return use;
}

Standing::Call Group::current_call() const {
  Standing::Call call;
  call.group = id_;
  call.tag = context_.tag;
  call.group_rank = rank();
  std::string members = rank_list(ranks_);
  if (members.size() > call.members.size()) {
    members.replace(call.members.size() - 3, members.npos, "...");
  }
  std::copy(members.begin(), members.end(), call.members.begin());
  call.number = context_.sequence - context_.parts;
  call.signature = window_.announced_signature(window_.local_rank(), context_.announced);
  call.hash = window_.announced_hash(window_.local_rank(), context_.announced);
  return call;
}

bool Group::end(NoticeKind kind, int rank, const std::string& text) {
  if (!window_.notice().post(kind, rank, text)) return false;
  window_.ring_all();
  return true;
}

std::string Group::describe_gpu_call() const {
  const std::string launched = gpus_->describe();
  if (!launched.empty()) return launched;
  if (current_ && pending_.operation.device >= 0) return current_->describe();
  return "what is on the GPU of rank " + std::to_string(rank());
}

void Group::watch_gpus() {
  if (!gpus_busy()) return;
  if (state_.load(std::memory_order_acquire) & kFinished) return gpus_->abort();
  try {
    gpus_->poll();
  } catch (...) {
    fail(describe_gpu_call());  // aborted with the next look
  }
}

bool Group::has_drained(nccl::GpuGroup& gpus) const {
  try {
    return nccl::drain(gpus, [this] { return given_up_elsewhere(); });
  } catch (const CommError&) {
    return false;
  }
}

void Group::abandon() {
  post_office_.abandon();  // on all ranks before the group's own GPUs: leaving waits for the others
  std::deque<Pending> left;
  const auto error = std::make_exception_ptr(CommError(
      "pycomm was shut down: what had not ended by then was abandoned, and nothing can be started. "
      "Wait for every Work before shutdown(); call pycomm.init() to start over."));
  if (gpus_ != nullptr && failed()) gpus_->abort();
  {
    std::lock_guard lock(mutex_);
    finish(error);
    left.swap(queue_);
    state_.fetch_and(~kQueued, std::memory_order_acq_rel);
  }
  if (current_) {
    // The others have seen it begin: they neither wait for it nor take its buffer for sound.
    tell(NoticeKind::kMismatch, current_->describe() +
                                    ": called shutdown() before it had ended.\n  Wait for every "
                                    "Work before shutdown().");
    keep_output_of(pending_.operation);
    end_current(error);
  }
  if (gpus_ != nullptr && !has_drained(*gpus_)) gpus_->abort();
  gpus_.reset();
  for (const Pending& pending : left) {
    journal_.end(pending.entry, /*failed=*/true);
    pending.work->complete(error, 0);
  }
}

void Group::end_current(std::exception_ptr error) {
  const double seconds = current_ ? current_->seconds() : 0;
  if (current_) {
    journal_.end(pending_.entry, context_, error != nullptr);
  } else {
    journal_.end(pending_.entry, /*failed=*/true);  // never begun
  }
  current_.reset();
  const auto work = std::move(pending_.work);
  pending_.operation.device_memory.reset();
  state_.fetch_and(~kRunning, std::memory_order_acq_rel);  // advance() looks at the queue again
  work->complete(std::move(error), seconds);
}

void Group::end_current_with_error() {
  auto error = std::current_exception();
  try {
    std::rethrow_exception(error);
  } catch (const nccl::RefusedError&) {
    // The group goes on.
  } catch (...) {
    error = fail(describe_call(context_, pending_.operation));
    keep_output_of(pending_.operation);
  }
  end_current(error);
  if (gpus_ != nullptr && failed()) gpus_->abort();
}

void Group::finish(std::exception_ptr error) {
  if (!failure_) failure_ = std::move(error);
  state_.fetch_or(kFinished, std::memory_order_acq_rel);
}

std::exception_ptr Group::fail(const std::string& call) {
  std::exception_ptr error = std::current_exception();
  const std::string hint = process_->black_box().hint();
  std::string text = interrupted_in(call, rank());
  std::exception_ptr lasting;
  try {
    std::rethrow_exception(error);
  } catch (const CommError& comm_error) {
    text = comm_error.what();
    if (knows_no_call(text)) text.insert(0, call + ": ");
    for (const std::string& line : {describe_ranks(ranks_), hint}) {
      if (text.find(line) == text.npos) text += line;  // as an error that another rank told has
    }
    if (text != comm_error.what()) error = with_text(error, text);
    lasting = error;
  } catch (...) {
    // Not ours (Ctrl-C in the caller): it ends this call alone, the group ends with our own error.
    lasting = std::make_exception_ptr(PeerLostError(text));
  }
  {
    std::lock_guard lock(mutex_);
    finish(lasting);
  }
  tell(kind_of(lasting), text);
  return error;
}

void Group::tell(NoticeKind kind, const std::string& text) {
  // Before the others hear of it, if it is from here: they still are where they were.
  BlackBox& black_box = process_->black_box();
  const bool saves = window_.begin_saving();
  Trace trace = saves ? black_box.take(text) : Trace();
  const bool posted = window_.notice().post(kind, rank(), text);
  window_.ring_all();
  if (posted && spans_hosts()) process_->tell_end(*this, rank(), kind, text);
  if (saves) black_box.save(std::move(trace));
}

void Group::keep_output_of(const Operation& operation) {
  if (operation.output != nullptr) process_->arena->quarantine(operation.output);
}

void Group::quarantine(std::shared_ptr<ArenaBlock> memory) {
  ArenaBlock::quarantine(std::move(memory));
}

std::shared_ptr<ArenaBlock> Group::allocate(std::size_t bytes) { return process_->allocate(bytes); }

nccl::Plane& Group::gpu_plane() { return process_->gpu_plane(); }

std::byte* Group::mapped(int rank, std::uint64_t offset, std::size_t bytes) const {
  const int world_rank = ranks_[static_cast<std::size_t>(rank)];
  const int local = process_->placement.local_rank_of[static_cast<std::size_t>(world_rank)];
  const Arena& arena = *process_->local_arenas[static_cast<std::size_t>(local)];
  if (!arena.holds(offset, bytes)) {
    throw CommError("rank " + std::to_string(rank) + " has no " + std::to_string(bytes) +
                    " bytes at " + std::to_string(offset) + " of its shared memory.");
  }
  return arena.base() + offset;
}

void Group::abort(const std::string& reason) {
  if (in_forked_child()) return;
  {
    std::lock_guard lock(mutex_);
    if (!failure_) aborted_here_ = true;
    finish(std::make_exception_ptr(PeerLostError(reason)));
  }
  tell(NoticeKind::kPeerLost, reason);
}

void Group::check_notices() const { window_.check_notices(); }

bool Group::given_up_elsewhere() const {
  try {
    check_notices();
    return window_.lost_peer() >= 0 || !process_->loss_among(ranks_).empty();
  } catch (const CommError&) {
    return true;
  }
}

bool Group::failed() const {
  std::lock_guard lock(mutex_);
  return failure_ != nullptr;
}

std::exception_ptr Group::failure() const {
  std::lock_guard lock(mutex_);
  return aborted_here_ ? nullptr : failure_;
}

}  // namespace pycomm
