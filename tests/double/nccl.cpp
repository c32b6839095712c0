// The stand-in for libnccl, non-blocking communicators only. It reduces as NCCL's ring does: from
// rank to rank, rounding to the element's type each time. The rank whose step runs first moves what
// belongs to all, as NCCL's kernels reach the memory of other GPUs.

#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "double/clique.h"
#include "double/gpu.h"
#include "kernels/fold.h"

namespace {

using gpu_double::blame;
using gpu_double::Call;
using gpu_double::change;
using gpu_double::Clique;
using gpu_double::MappedMemory;
using gpu_double::Seat;
using gpu_double::SharedFile;
using gpu_double::What;

/// What one step of a stream does: one call, or those of an NCCL group.
struct Batch {
  std::vector<Call> calls;
  bool posted = false;  // the other ranks see it
};

/// Memory that a communicator knows.
struct Known {
  const void* address;
  std::size_t bytes;
};

/// How many communicators know memory, by its address.
std::map<const void*, int>& known_memory() {
  static auto* const all = new std::map<const void*, int>;
  return *all;
}

/// One rank's part of a communicator; steps keep it alive after its handle.
struct Member {
  Member(std::shared_ptr<Clique> clique, int rank, int device)
      : clique(std::move(clique)), rank(static_cast<std::size_t>(rank)), device(device) {}

  const std::shared_ptr<Clique> clique;
  const std::size_t rank;
  const int device;
  std::vector<std::shared_ptr<MappedMemory>> memories;  // everyone's, once all have joined
  bool aborted = false;
  int steps = 0;  // on the stream
  /// How often ncclCommGetAsyncError says ncclInProgress before what was asked for has begun.
  int polls = 2;
  std::vector<std::pair<cudaStream_t, std::shared_ptr<Batch>>> asked;
  std::map<int, double> factors;  // of operators
  int next_operator = ncclNumOps;
  std::map<void*, Known> known;  // by handle
  std::size_t windows = 0;       // asked for
  struct {
    ncclWindow_t* handle = nullptr;
    Known memory{};
  } window;  // being registered, if there is a handle
  struct {
    ncclComm_t* handle = nullptr;
    std::shared_ptr<Member> member;
  } child;  // being made, if there is a handle

  void join() {
    clique->locked([&](Clique::Ranks& ranks) {
      ranks.seats[rank].taken = true;
      ranks.seats[rank].device = device;
      ranks.seats[rank].memory = gpu_double::memory_name();
    });
  }
  /// The others do not see its calls any more.
  void withdraw() {
    aborted = true;
    asked.clear();
    clique->locked([&](Clique::Ranks& ranks) { ranks.seats[rank].call_count = 0; });
  }

  /// Whether all have joined, and their memory can be reached.
  bool connects() {
    if (!memories.empty()) return true;
    std::vector<SharedFile::Name> names;
    clique->locked([&](const Clique::Ranks& ranks) {
      if (!ranks.complete()) return;
      for (int r = 0; r < ranks.size; ++r) {
        names.push_back(ranks.seats[static_cast<std::size_t>(r)].memory);
      }
    });
    for (const SharedFile::Name& name : names) memories.push_back(gpu_double::find_memory(name));
    if (std::count(memories.begin(), memories.end(), nullptr) > 0) memories.clear();
    return !memories.empty();
  }
  bool has_window() {
    return clique->locked(
        [&](const Clique::Ranks& ranks) { return ranks.has_window(windows - 1); });
  }
  bool waits_for_others() {
    return !connects() || (window.handle != nullptr && !has_window()) ||
           (child.handle != nullptr && !child.member->connects());
  }
  bool in_progress() { return waits_for_others() || polls > 0; }
  bool is_busy() { return in_progress() || steps > 0 || !asked.empty(); }

  /// What others have made of the communicator.
  ncclResult_t error() {
    const bool tells_of_lost = gpu_double::tells_of_lost_processes() && !aborted;
    return clique->locked([&](const Clique::Ranks& ranks) {
      for (int r = 0; tells_of_lost && r < ranks.size; ++r) {
        const Seat& seat = ranks.seats[static_cast<std::size_t>(r)];
        if (seat.taken && gpu_double::find_memory(seat.memory) == nullptr) return ncclRemoteError;
      }
      return ranks.seats[rank].error;
    });
  }

  void* know(const Known& memory) {
    ++known_memory()[memory.address];
    gpu_double::count_registrations(1);
    void* const handle = new char;
    known[handle] = memory;
    return handle;
  }
  void forget(void* handle) {
    if (--known_memory()[known.at(handle).address] == 0) {
      known_memory().erase(known.at(handle).address);
    }
    known.erase(handle);
    delete static_cast<char*>(handle);
  }
};

pycomm::DType dtype_of(ncclDataType_t type) {
  using pycomm::DType;
  switch (type) {
    case ncclInt8:
      return DType::kInt8;
    case ncclUint8:
      return DType::kUint8;
    case ncclInt32:
      return DType::kInt32;
    case ncclInt64:
      return DType::kInt64;
    case ncclFloat16:
      return DType::kFloat16;
    case ncclBfloat16:
      return DType::kBFloat16;
    case ncclFloat32:
      return DType::kFloat32;
    default:
      return DType::kFloat64;
  }
}

pycomm::ReduceOp op_of(ncclRedOp_t op) {
  using pycomm::ReduceOp;
  return op == ncclProd  ? ReduceOp::kProd
         : op == ncclMax ? ReduceOp::kMax
         : op == ncclMin ? ReduceOp::kMin
                         : ReduceOp::kSum;
}

/// A collective that all streams have come to.
class Collective {
 public:
  Collective(const Member& member, Clique::Ranks& ranks) : memories_(member.memories) {
    for (int r = 0; r < ranks.size; ++r) {
      calls_.push_back(&ranks.seats[static_cast<std::size_t>(r)].calls[0]);
    }
  }

  const std::vector<Call*>& calls() const { return calls_; }

  /// Moves what its calls, which agree, ask for.
  void perform() const {
    const Call& first = *calls_[0];
    const std::size_t bytes = first.count * size_of(dtype_of(first.type));
    if (bytes == 0) return;
    const auto root = static_cast<std::size_t>(first.peer);
    switch (first.what) {
      case What::kAllReduce:
      case What::kReduce: {
        const auto sum = reduced(0, first.count);
        for (std::size_t rank = 0; rank < calls_.size(); ++rank) {
          if (first.what == What::kReduce && rank != root) continue;
          std::memcpy(output(rank), sum.data(), bytes);
        }
        break;
      }
      case What::kReduceScatter: {
        std::vector<std::vector<std::byte>> sums;  // an output may lie in an input
        for (std::size_t r = 0; r < calls_.size(); ++r) {
          sums.push_back(reduced(r * bytes, first.count));
        }
        for (std::size_t rank = 0; rank < calls_.size(); ++rank) {
          std::memcpy(output(rank), sums[rank].data(), bytes);
        }
        break;
      }
      case What::kBroadcast:
        for (std::size_t rank = 0; rank < calls_.size(); ++rank) {
          std::memmove(output(rank), input(root), bytes);
        }
        break;
      case What::kAllGather:
        for (std::size_t rank = 0; rank < calls_.size(); ++rank) {
          for (std::size_t r = 0; r < calls_.size(); ++r) {
            std::memmove(output(rank) + r * bytes, input(r), bytes);
          }
        }
        break;
      case What::kSend:
      case What::kRecv:
        break;
    }
  }

 private:
  std::byte* input(std::size_t rank) const { return memories_[rank]->at(calls_[rank]->input); }
  std::byte* output(std::size_t rank) const { return memories_[rank]->at(calls_[rank]->output); }

  /// `count` elements behind `offset` bytes of each rank's input.
  std::vector<std::byte> reduced(std::size_t offset, std::size_t count) const {
    const pycomm::DType dtype = dtype_of(calls_[0]->type);
    std::vector<std::byte> sum(count * size_of(dtype));
    std::vector<std::byte> scaled(sum.size());
    for (std::size_t rank = 0; rank < calls_.size(); ++rank) {
      const std::byte* source = input(rank) + offset;
      if (calls_[rank]->scales) {
        const pycomm::FoldSpec scale{dtype, dtype, pycomm::ReduceOp::kSum, 1, calls_[rank]->factor};
        pycomm::fold(scale, scaled.data(), {&source, 1}, count);
        source = scaled.data();
      }
      if (rank == 0) {
        std::memcpy(sum.data(), source, sum.size());
        continue;
      }
      const std::byte* const both[] = {sum.data(), source};
      pycomm::fold({dtype, dtype, op_of(calls_[0]->op)}, sum.data(), both, count);
    }
    return sum;
  }

  const std::vector<std::shared_ptr<MappedMemory>>& memories_;
  std::vector<Call*> calls_;
};

std::span<Call> calls_at(Seat& seat) { return std::span(seat.calls).first(seat.call_count); }

/// The other half of a rank's message, if the peer's stream has come to it.
Call* other_half(Clique::Ranks& ranks, std::size_t rank, const Call& call) {
  for (Call& other : calls_at(ranks.seats[static_cast<std::size_t>(call.peer)])) {
    const What wanted = call.what == What::kSend ? What::kRecv : What::kSend;
    if (!other.done && other.what == wanted && static_cast<std::size_t>(other.peer) == rank) {
      return &other;
    }
  }
  return nullptr;
}

bool all_have_come(const Clique::Ranks& ranks) {
  return std::all_of(ranks.seats.begin(), ranks.seats.begin() + ranks.size, [](const Seat& seat) {
    return seat.call_count > 0 && !seat.calls[0].done && !seat.calls[0].is_message();
  });
}

/// Whether everything that the rank's stream has come to can be moved, or has been.
bool can_move(Clique::Ranks& ranks, std::size_t rank) {
  const auto calls = calls_at(ranks.seats[rank]);
  return !ranks.broken && !calls.empty() &&
         std::all_of(calls.begin(), calls.end(), [&](const Call& call) {
           if (call.done) return true;
           return call.is_message() ? other_half(ranks, rank, call) != nullptr
                                    : all_have_come(ranks);
         });
}

/// Their streams look again.
void wake_everyone(const Member& member) {
  for (const auto& memory : member.memories) memory->bell().ring();
}

bool ready(const std::shared_ptr<Member>& member, const std::shared_ptr<Batch>& batch) {
  if (member->aborted) return true;
  return member->clique->locked([&](Clique::Ranks& ranks) {
    if (!std::exchange(batch->posted, true)) {
      Seat& seat = ranks.seats[member->rank];
      seat.call_count = batch->calls.size();
      std::copy(batch->calls.begin(), batch->calls.end(), seat.calls.begin());
      wake_everyone(*member);
    }
    return can_move(ranks, member->rank);
  });
}

void fail(Clique::Ranks& ranks, const std::string& what) {
  blame(what);
  for (Seat& seat : ranks.seats) seat.error = ncclInvalidUsage;
}

void move_message(const Member& member, Clique::Ranks& ranks, Call& call) {
  Call& other = *other_half(ranks, member.rank, call);
  call.done = other.done = true;
  const MappedMemory& mine = *member.memories[member.rank];
  const MappedMemory& peers = *member.memories[static_cast<std::size_t>(call.peer)];
  const bool sends = call.what == What::kSend;
  const auto& [send, recv] = sends ? std::tie(call, other) : std::tie(other, call);
  if (send.count != recv.count || send.type != recv.type) {
    return fail(ranks, "a message of " + std::to_string(send.count) + " elements was received as " +
                           std::to_string(recv.count));
  }
  std::memmove((sends ? peers : mine).at(recv.output), (sends ? mine : peers).at(send.input),
               send.count * size_of(dtype_of(send.type)));
}

void move_collective(const Member& member, Clique::Ranks& ranks) {
  const Collective collective(member, ranks);
  const auto& calls = collective.calls();
  for (Call* const each : calls) each->done = true;
  const auto differing = std::find_if(calls.begin(), calls.end(), [&](const Call* other) {
    return !other->agrees_with(*calls[0]);
  });
  if (differing == calls.end()) return collective.perform();
  fail(ranks, "ranks made different calls: " + std::to_string(calls[0]->count) + " and " +
                  std::to_string((*differing)->count) + " elements");
}

/// @return  false: another process has come between.
bool move(const Member& member) {
  if (member.aborted) return true;
  return member.clique->locked([&](Clique::Ranks& ranks) {
    if (!can_move(ranks, member.rank)) return false;
    Seat& seat = ranks.seats[member.rank];
    for (Call& call : calls_at(seat)) {
      if (call.done) continue;
      if (call.is_message()) {
        move_message(member, ranks, call);
      } else {
        move_collective(member, ranks);
      }
    }
    seat.call_count = 0;
    wake_everyone(member);
    return true;
  });
}

gpu_double::Step step_of(const std::shared_ptr<Member>& member, cudaStream_t stream,
                         const std::shared_ptr<Batch>& batch) {
  return {[=] { return ready(member, batch); },
          [=] {
            if (!move(*member)) return gpu_double::put_back(stream, step_of(member, stream, batch));
            --member->steps;
          }};
}

/// Those that this process made and no rank of it has joined.
std::vector<std::shared_ptr<Clique>>& made_cliques() {
  static auto* const all = new std::vector<std::shared_ptr<Clique>>;
  return *all;
}

/// Its maker's first rank keeps it open for the others. Null: the maker is gone, or has given up.
std::shared_ptr<Clique> clique_of(const ncclUniqueId& id) {
  SharedFile::Name name{};
  std::memcpy(&name, id.internal, sizeof(name));
  auto& made = made_cliques();
  const auto own = std::find_if(made.begin(), made.end(),
                                [&](const auto& clique) { return clique->name() == name; });
  if (own == made.end()) return Clique::find(name);
  auto clique = std::move(*own);
  made.erase(own);
  return clique;
}

/// Calls of this thread's NCCL group.
struct Group {
  int depth = 0;
  std::vector<std::pair<std::shared_ptr<Member>, cudaStream_t>> places;
  std::vector<std::shared_ptr<Batch>> batches;
};
thread_local Group group;

}  // namespace

struct ncclComm {
  std::shared_ptr<Member> member;
};

namespace {

ncclResult_t ask(const std::shared_ptr<Member>& member, cudaStream_t stream,
                 const std::shared_ptr<Batch>& batch) {
  ncclResult_t result = ncclInProgress;
  change([&] {
    if (member->in_progress()) {
      blame("a call on a communicator that is still busy with the one before");
      result = ncclInvalidUsage;
    } else if (gpu_double::device_of(stream) != member->device) {
      blame("a call on another GPU's stream");
      result = ncclInvalidArgument;
    } else if (batch->calls.size() > gpu_double::kMostCalls) {
      blame("more calls in an NCCL group than the double has room for");
      result = ncclInvalidUsage;
    } else {
      member->asked.emplace_back(stream, batch);
      member->polls = 2;
    }
  });
  return result;
}

/// Neither is looked at where nothing is moved.
bool is_on_gpu(const void* address, const Call& call) {
  return address == nullptr || call.count == 0 || gpu_double::memory_offset(address).has_value();
}

ncclResult_t enqueue(ncclComm_t communicator, cudaStream_t stream, const void* input,
                     const void* output, Call call) {
  const auto& member = communicator->member;
  if (!is_on_gpu(input, call) || !is_on_gpu(output, call)) {
    change([] { blame("a call on memory that is not the GPU's"); });
    return ncclInvalidArgument;
  }
  call.input = gpu_double::memory_offset(input).value_or(0);
  call.output = gpu_double::memory_offset(output).value_or(0);
  if (const auto factor = member->factors.find(call.op); factor != member->factors.end()) {
    call.scales = true;
    call.factor = factor->second;
    call.op = ncclSum;
  }
  if (group.depth == 0) return ask(member, stream, std::make_shared<Batch>(Batch{{call}, false}));
  for (std::size_t i = 0; i < group.places.size(); ++i) {
    if (group.places[i].first != member) continue;
    group.batches[i]->calls.push_back(call);
    return ncclSuccess;
  }
  group.places.emplace_back(member, stream);
  group.batches.push_back(std::make_shared<Batch>(Batch{{call}, false}));
  return ncclSuccess;
}

/// What was asked for begins: only from here on is it on its stream.
void begin(const std::shared_ptr<Member>& member) {
  decltype(member->asked) begun;
  change([&] {  // steps of calls before are being counted off
    if (ncclWindow_t* const handle = std::exchange(member->window.handle, nullptr)) {
      const bool differ = member->clique->locked([&](Clique::Ranks& ranks) {
        const bool found = ranks.windows_differ(member->windows - 1);
        if (found) fail(ranks, "the ranks' windows differ in size");
        return found;
      });
      if (!differ && gpu_double::nccl_windows(member->device)) {
        *handle = static_cast<ncclWindow_t>(member->know(member->window.memory));
      }
    }
    if (ncclComm_t* const handle = std::exchange(member->child.handle, nullptr)) {
      *handle = new ncclComm{std::exchange(member->child.member, nullptr)};
      gpu_double::count_communicators(1);
    }
    begun.swap(member->asked);
    member->steps += static_cast<int>(begun.size());
  });
  for (auto& [stream, batch] : begun) {
    gpu_double::push(stream, step_of(member, stream, batch));
  }
}

/// Handles whose freeing was forgotten: for the leak that the census shows, not one that a
/// sanitizer takes for the double's own.
std::vector<std::unique_ptr<ncclComm>>& never_freed() {
  static auto* const all = new std::vector<std::unique_ptr<ncclComm>>;
  return *all;
}

ncclResult_t free_communicator(ncclComm_t communicator, bool aborts) {
  bool forgotten = false;
  change([&] {
    forgotten = gpu_double::forgotten(aborts ? "ncclCommAbort" : "ncclCommDestroy");
    if (forgotten) return;
    Member& member = *communicator->member;
    if (!aborts && member.steps > 0) blame("a communicator was destroyed with calls on the GPU");
    if (!member.factors.empty()) blame("a communicator was freed before its operators");
    if (!aborts && !member.known.empty()) blame("a communicator that knows memory was destroyed");
    if (aborts) gpu_double::count_registrations(-static_cast<int>(member.known.size()));
    while (!member.known.empty()) member.forget(member.known.begin()->first);
    if (member.child.handle != nullptr) {  // is not made any more
      const Member& child = *member.child.member;
      child.clique->locked([&](Clique::Ranks& ranks) { ranks.seats[child.rank].taken = false; });
      member.child = {};
    }
    member.withdraw();
    gpu_double::count_communicators(-1);
  });
  std::unique_ptr<ncclComm> handle(communicator);
  if (forgotten) never_freed().push_back(std::move(handle));
  return ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  const int claimed = gpu_double::nccl_version(gpu_double::current_device());
  *version = claimed != 0 ? claimed : NCCL_VERSION_CODE;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t) { return "the double refuses"; }

const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static_assert(sizeof(SharedFile::Name) <= sizeof(id->internal));
  const auto clique = std::make_shared<Clique>();
  const SharedFile::Name name = clique->name();
  std::memcpy(id->internal, &name, sizeof(name));
  change([&] { made_cliques().push_back(clique); });
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* communicator, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (config == nullptr || config->blocking != 0) return ncclInvalidArgument;
  if (size > gpu_double::kMostRanks) return ncclInvalidArgument;
  ncclResult_t result = ncclInProgress;
  change([&] {
    const auto clique = clique_of(id);
    if (clique == nullptr) {
      result = ncclRemoteError;
      return;
    }
    const int device = gpu_double::current_device();
    clique->locked([&](Clique::Ranks& ranks) {
      if (ranks.size == 0) ranks.size = size;
      for (const Seat& other : ranks.seats) {
        if (other.taken && other.device == device) result = ncclInvalidUsage;
      }
    });
    if (result == ncclInvalidUsage) return blame("two ranks on one GPU");
    *communicator = new ncclComm{std::make_shared<Member>(clique, rank, device)};
    (*communicator)->member->join();
    gpu_double::count_communicators(1);
  });
  return result;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t* error) {
  const auto& member = communicator->member;
  bool begins = false;
  change([&] {
    if (!member->waits_for_others() && member->polls > 0) begins = --member->polls == 0;
    *error = member->error();
    if (*error == ncclSuccess && member->in_progress()) *error = ncclInProgress;
    if (const int told = gpu_double::nccl_error(member->device); told != 0) {
      *error = static_cast<ncclResult_t>(told);
    }
  });
  if (begins) begin(member);
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t communicator) {
  change([&] { communicator->member->polls = 1; });
  return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  return free_communicator(communicator, /*aborts=*/false);
}

ncclResult_t ncclCommAbort(ncclComm_t communicator) {
  return free_communicator(communicator, /*aborts=*/true);
}

ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (--group.depth > 0) return ncclSuccess;
  const Group ended = std::exchange(group, {});
  ncclResult_t result = ncclSuccess;
  for (std::size_t i = 0; i < ended.places.size(); ++i) {
    result = ask(ended.places[i].first, ended.places[i].second, ended.batches[i]);
  }
  return result;
}

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void* scalar, ncclDataType_t type,
                                      ncclScalarResidence_t residence, ncclComm_t communicator) {
  if (residence != ncclScalarHostImmediate) return ncclInvalidArgument;
  double factor = 0;
  if (type == ncclFloat64) {
    factor = *static_cast<double*>(scalar);
  } else {
    const auto* const source = static_cast<const std::byte*>(scalar);
    float single = 0;
    const pycomm::DType dtype = dtype_of(type);
    pycomm::fold({dtype, pycomm::DType::kFloat32}, reinterpret_cast<std::byte*>(&single),
                 {&source, 1}, 1);
    factor = single;
  }
  Member& member = *communicator->member;
  change([&] {
    *op = static_cast<ncclRedOp_t>(member.next_operator++);
    member.factors[*op] = factor;
  });
  return ncclSuccess;
}

ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t communicator) {
  change([&] { communicator->member->factors.erase(op); });
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* input, void* output, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, input, output, {What::kAllReduce, 0, 0, count, type, op});
}

ncclResult_t ncclReduce(const void* input, void* output, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, input, output, {What::kReduce, 0, 0, count, type, op, root});
}

ncclResult_t ncclReduceScatter(const void* input, void* output, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, input, output,
                 {What::kReduceScatter, 0, 0, count, type, op});
}

ncclResult_t ncclBroadcast(const void* input, void* output, size_t count, ncclDataType_t type,
                           int root, ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, input, output,
                 {What::kBroadcast, 0, 0, count, type, ncclSum, root});
}

ncclResult_t ncclAllGather(const void* input, void* output, size_t count, ncclDataType_t type,
                           ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, input, output, {What::kAllGather, 0, 0, count, type});
}

ncclResult_t ncclSend(const void* input, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t communicator, cudaStream_t stream) {
  const std::size_t bytes = count * size_of(dtype_of(type));
  gpu_double::count_sent(static_cast<int>(communicator->member->rank), peer, bytes);
  return enqueue(communicator, stream, input, nullptr,
                 {What::kSend, 0, 0, count, type, ncclSum, peer});
}

ncclResult_t ncclRecv(void* output, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, nullptr, output,
                 {What::kRecv, 0, 0, count, type, ncclSum, peer});
}

#ifndef DOUBLE_OF_NCCL_2_18  // what came later

ncclResult_t ncclMemAlloc(void** address, size_t bytes) {
  *address = gpu_double::allocate(bytes);
  return *address != nullptr ? ncclSuccess : ncclSystemError;
}

ncclResult_t ncclMemFree(void* address) {
  change([&] {
    if (known_memory().count(address) != 0) blame("memory was freed that a communicator knows");
  });
  return gpu_double::free(address) ? ncclSuccess : ncclInvalidArgument;
}

ncclResult_t ncclCommWindowRegister(ncclComm_t communicator, void* address, size_t bytes,
                                    ncclWindow_t* window, int) {
  Member& member = *communicator->member;
  *window = nullptr;
  change([&] {
    if (member.is_busy()) blame("a window was registered with a call on the GPU");
    member.clique->locked([&](Clique::Ranks& ranks) {
      Seat& seat = ranks.seats[member.rank];
      seat.window_bytes[seat.windows % seat.window_bytes.size()] = bytes;
      member.windows = ++seat.windows;
    });
    member.window = {window, {address, bytes}};
    member.polls = 2;
  });
  return ncclInProgress;
}

ncclResult_t ncclCommRegister(ncclComm_t communicator, void* address, size_t bytes, void** handle) {
  Member& member = *communicator->member;
  change([&] {
    if (member.is_busy()) blame("a buffer was registered with a call on the GPU");
    *handle = member.know({address, bytes});
  });
  return ncclSuccess;
}

}  // extern "C"

namespace {

ncclResult_t deregister(const char* function, ncclComm_t communicator, void* handle) {
  Member& member = *communicator->member;
  ncclResult_t result = ncclSuccess;
  change([&] {
    if (gpu_double::forgotten(function)) return;
    if (member.is_busy()) blame("memory was deregistered with a call on the GPU");
    if (member.known.count(handle) == 0) {
      result = ncclInvalidArgument;
      return blame("memory was deregistered that was not registered");
    }
    member.forget(handle);
    gpu_double::count_registrations(-1);
  });
  return result;
}

/// The clique of those that are left; whoever needs it first makes it.
std::shared_ptr<Clique> clique_without(const Member& member, const std::vector<int>& lost) {
  return member.clique->locked([&](Clique::Ranks& ranks) {
    std::size_t which = 0;
    for (const int rank : lost) which |= std::size_t{1} << rank;
    SharedFile::Name& name = ranks.without[which];
    auto clique = Clique::find(name);
    if (clique == nullptr) {
      clique = std::make_shared<Clique>();
      name = clique->name();
    }
    const int size = ranks.size - static_cast<int>(lost.size());
    clique->locked([&](Clique::Ranks& left) { left.size = size; });
    return clique;
  });
}

}  // namespace

extern "C" {

ncclResult_t ncclCommDeregister(ncclComm_t communicator, void* handle) {
  return deregister("ncclCommDeregister", communicator, handle);
}

ncclResult_t ncclCommWindowDeregister(ncclComm_t communicator, ncclWindow_t window) {
  return deregister("ncclCommWindowDeregister", communicator, window);
}

ncclResult_t ncclCommShrink(ncclComm_t communicator, int* excluded, int count, ncclComm_t* child,
                            ncclConfig_t*, int flags) {
  Member& member = *communicator->member;
  *child = nullptr;
  if (excluded == nullptr || count <= 0) return ncclInvalidArgument;
  std::vector<int> lost(excluded, excluded + count);
  std::sort(lost.begin(), lost.end());
  const int old_rank = static_cast<int>(member.rank);
  if (std::binary_search(lost.begin(), lost.end(), old_rank)) return ncclInvalidArgument;
  ncclResult_t result = ncclInProgress;
  change([&] {
    if ((flags & NCCL_SHRINK_ABORT) != 0) {
      member.withdraw();
    } else if (member.is_busy()) {
      blame("a communicator was shrunk with a call on the GPU");
    }
    const int told = gpu_double::nccl_error(member.device);
    if (told != 0) {
      result = static_cast<ncclResult_t>(told);
      return;
    }
    const auto clique = clique_without(member, lost);
    const auto before = std::lower_bound(lost.begin(), lost.end(), old_rank) - lost.begin();
    const int rank = old_rank - static_cast<int>(before);
    member.child = {child, std::make_shared<Member>(clique, rank, member.device)};
    member.child.member->join();
    member.polls = 2;
  });
  return result;
}

#endif

}  // extern "C"
