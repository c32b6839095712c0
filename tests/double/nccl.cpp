// The stand-in for libnccl, non-blocking communicators only. It reduces as NCCL's ring does: from
// rank to rank, rounding to the element's type each time.

#include <nccl.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "double/gpu.h"
#include "kernels/fold.h"

namespace {

using gpu_double::blame;
using gpu_double::change;
using gpu_double::reachable;

enum class What { kAllReduce, kReduce, kReduceScatter, kBroadcast, kAllGather, kSend, kRecv };

/// One call, as a rank made it.
struct Call {
  What what;
  const void* input;
  void* output;
  std::size_t count;
  ncclDataType_t type;
  ncclRedOp_t op = ncclSum;
  int peer = 0;  // or root
  std::optional<double> factor = {};
  bool done = false;

  bool is_message() const { return what == What::kSend || what == What::kRecv; }
  bool agrees_with(const Call& other) const {
    return what == other.what && count == other.count && type == other.type && op == other.op &&
           peer == other.peer && factor == other.factor;
  }
};

/// What one step of a stream does: one call, or those of an NCCL group.
struct Batch {
  std::vector<Call> calls;
};

struct Member;

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

/// The ranks of a communicator.
struct Clique {
  explicit Clique(int size)
      : members(static_cast<std::size_t>(size)), heads(static_cast<std::size_t>(size)) {}
  std::vector<Member*> members;                   // null: has not joined
  std::vector<std::shared_ptr<Batch>> heads;      // what each rank's stream has come to
  std::vector<std::vector<std::size_t>> windows;  // what each rank registers, in order
  std::map<std::vector<int>, std::shared_ptr<Clique>> without;  // these ranks

  bool complete() const {
    return std::find(members.begin(), members.end(), nullptr) == members.end();
  }
  bool has_window(std::size_t number) const {
    return windows.size() > number && windows[number].size() == members.size();
  }
};

/// One rank's part of it; steps keep it alive after its handle.
struct Member {
  Member(std::shared_ptr<Clique> clique, int rank, int device)
      : clique(std::move(clique)), rank(rank), device(device) {}

  const std::shared_ptr<Clique> clique;
  const int rank;
  const int device;
  bool aborted = false;
  ncclResult_t error = ncclSuccess;
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

  bool waits_for_others() const {
    return !clique->complete() || (window.handle != nullptr && !clique->has_window(windows - 1)) ||
           (child.handle != nullptr && !child.member->clique->complete());
  }
  bool in_progress() const { return waits_for_others() || polls > 0; }
  bool is_busy() const { return in_progress() || steps > 0 || !asked.empty(); }

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

std::byte* bytes_at(const void* address) { return static_cast<std::byte*>(reachable(address)); }

/// `count` elements behind `offset` bytes of each rank's input.
std::vector<std::byte> reduced(const std::vector<Call*>& calls, std::size_t offset,
                               std::size_t count) {
  const pycomm::DType dtype = dtype_of(calls[0]->type);
  std::vector<std::byte> sum(count * size_of(dtype));
  std::vector<std::byte> scaled(sum.size());
  for (std::size_t rank = 0; rank < calls.size(); ++rank) {
    const std::byte* source = bytes_at(calls[rank]->input) + offset;
    if (calls[rank]->factor) {
      const pycomm::FoldSpec scale{dtype, dtype, pycomm::ReduceOp::kSum, 1, *calls[rank]->factor};
      pycomm::fold(scale, scaled.data(), {&source, 1}, count);
      source = scaled.data();
    }
    if (rank == 0) {
      std::memcpy(sum.data(), source, sum.size());
      continue;
    }
    const std::byte* const both[] = {sum.data(), source};
    pycomm::fold({dtype, dtype, op_of(calls[0]->op)}, sum.data(), both, count);
  }
  return sum;
}

/// A collective whose ranks' calls agree.
void perform(const std::vector<Call*>& calls) {
  const Call& first = *calls[0];
  const std::size_t bytes = first.count * size_of(dtype_of(first.type));
  if (bytes == 0) return;
  const auto root = static_cast<std::size_t>(first.peer);
  switch (first.what) {
    case What::kAllReduce:
    case What::kReduce: {
      const auto sum = reduced(calls, 0, first.count);
      for (std::size_t rank = 0; rank < calls.size(); ++rank) {
        if (first.what == What::kReduce && rank != root) continue;
        std::memcpy(bytes_at(calls[rank]->output), sum.data(), bytes);
      }
      break;
    }
    case What::kReduceScatter: {
      std::vector<std::vector<std::byte>> sums;  // an output may lie in an input
      for (std::size_t r = 0; r < calls.size(); ++r) {
        sums.push_back(reduced(calls, r * bytes, first.count));
      }
      for (std::size_t rank = 0; rank < calls.size(); ++rank) {
        std::memcpy(bytes_at(calls[rank]->output), sums[rank].data(), bytes);
      }
      break;
    }
    case What::kBroadcast:
      for (Call* const call : calls) {
        std::memmove(bytes_at(call->output), bytes_at(calls[root]->input), bytes);
      }
      break;
    case What::kAllGather:
      for (Call* const call : calls) {
        for (std::size_t r = 0; r < calls.size(); ++r) {
          std::memmove(bytes_at(call->output) + r * bytes, bytes_at(calls[r]->input), bytes);
        }
      }
      break;
    case What::kSend:
    case What::kRecv:
      break;
  }
}

/// The other half of a message, if the peer's stream has come to it.
Call* other_half(const Member& member, const Call& call) {
  const auto& head = member.clique->heads[static_cast<std::size_t>(call.peer)];
  if (head == nullptr) return nullptr;
  for (Call& other : head->calls) {
    const What wanted = call.what == What::kSend ? What::kRecv : What::kSend;
    if (!other.done && other.what == wanted && other.peer == member.rank) return &other;
  }
  return nullptr;
}

/// Every rank's call, if all streams have come to it.
std::vector<Call*> everyones(const Member& member) {
  std::vector<Call*> calls;
  for (const auto& head : member.clique->heads) {
    if (head == nullptr || head->calls[0].done || head->calls[0].is_message()) return {};
    calls.push_back(&head->calls[0]);
  }
  return calls;
}

bool ready(const std::shared_ptr<Member>& member, const std::shared_ptr<Batch>& batch) {
  if (member->aborted) return true;
  member->clique->heads[static_cast<std::size_t>(member->rank)] = batch;
  return std::all_of(batch->calls.begin(), batch->calls.end(), [&](const Call& call) {
    if (call.done) return true;
    return call.is_message() ? other_half(*member, call) != nullptr : !everyones(*member).empty();
  });
}

void fail(const Clique& clique, const std::string& what) {
  blame(what);
  for (Member* const member : clique.members) member->error = ncclInvalidUsage;
}

void move_message(const Member& member, Call& call) {
  Call& other = *other_half(member, call);
  call.done = other.done = true;
  const auto& [send, recv] =
      call.what == What::kSend ? std::tie(call, other) : std::tie(other, call);
  if (send.count != recv.count || send.type != recv.type) {
    return fail(*member.clique, "a message of " + std::to_string(send.count) +
                                    " elements was received as " + std::to_string(recv.count));
  }
  std::memmove(bytes_at(recv.output), bytes_at(send.input),
               send.count * size_of(dtype_of(send.type)));
}

void run(const std::shared_ptr<Member>& member, const std::shared_ptr<Batch>& batch) {
  --member->steps;
  auto& head = member->clique->heads[static_cast<std::size_t>(member->rank)];
  if (member->aborted) {
    head = nullptr;
    return;
  }
  for (Call& call : batch->calls) {
    if (call.done) continue;
    if (call.is_message()) {
      move_message(*member, call);
      continue;
    }
    const auto calls = everyones(*member);
    for (Call* const each : calls) each->done = true;
    const auto differing = std::find_if(calls.begin(), calls.end(), [&](const Call* other) {
      return !other->agrees_with(*calls[0]);
    });
    if (differing == calls.end()) {
      perform(calls);
    } else {
      fail(*member->clique, "ranks made different calls: " + std::to_string(calls[0]->count) +
                                " and " + std::to_string((*differing)->count) + " elements");
    }
  }
  head = nullptr;
}

std::map<std::string, std::shared_ptr<Clique>>& cliques() {
  static auto* const all = new std::map<std::string, std::shared_ptr<Clique>>;  // by unique id
  return *all;
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
    } else {
      member->asked.emplace_back(stream, batch);
      member->polls = 2;
    }
  });
  return result;
}

ncclResult_t enqueue(ncclComm_t communicator, cudaStream_t stream, Call call) {
  const auto& member = communicator->member;
  if (const auto factor = member->factors.find(call.op); factor != member->factors.end()) {
    call.factor = factor->second;
    call.op = ncclSum;
  }
  if (group.depth == 0) return ask(member, stream, std::make_shared<Batch>(Batch{{call}}));
  for (std::size_t i = 0; i < group.places.size(); ++i) {
    if (group.places[i].first != member) continue;
    group.batches[i]->calls.push_back(call);
    return ncclSuccess;
  }
  group.places.emplace_back(member, stream);
  group.batches.push_back(std::make_shared<Batch>(Batch{{call}}));
  return ncclSuccess;
}

/// What was asked for begins: only from here on is it on its stream.
void begin(const std::shared_ptr<Member>& member) {
  decltype(member->asked) begun;
  change([&] {  // steps of calls before are being counted off
    if (ncclWindow_t* const handle = std::exchange(member->window.handle, nullptr)) {
      const auto& sizes = member->clique->windows[member->windows - 1];
      if (std::adjacent_find(sizes.begin(), sizes.end(), std::not_equal_to<>()) != sizes.end()) {
        fail(*member->clique, "the ranks' windows differ in size");
      } else if (gpu_double::nccl_windows(member->device)) {
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
    gpu_double::push(stream, {[member, batch = batch] { return ready(member, batch); },
                              [member, batch = batch] { run(member, batch); }});
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
      child.clique->members[static_cast<std::size_t>(child.rank)] = nullptr;
      member.child = {};
    }
    member.aborted = true;
    member.asked.clear();
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
  static int made = 0;
  change([&] { std::snprintf(id->internal, sizeof(id->internal), "double %d", ++made); });
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* communicator, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (config == nullptr || config->blocking != 0) return ncclInvalidArgument;
  ncclResult_t result = ncclInProgress;
  change([&] {
    auto& clique = cliques()[id.internal];
    if (clique == nullptr) clique = std::make_shared<Clique>(size);
    const int device = gpu_double::current_device();
    for (const Member* other : clique->members) {
      if (other != nullptr && other->device == device) result = ncclInvalidUsage;
    }
    if (result == ncclInvalidUsage) return blame("two ranks on one GPU");
    *communicator = new ncclComm{std::make_shared<Member>(clique, rank, device)};
    clique->members[static_cast<std::size_t>(rank)] = (*communicator)->member.get();
    gpu_double::count_communicators(1);
  });
  return result;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t* error) {
  const auto& member = communicator->member;
  bool begins = false;
  change([&] {
    if (!member->waits_for_others() && member->polls > 0) begins = --member->polls == 0;
    *error = member->error != ncclSuccess ? member->error
             : member->in_progress()      ? ncclInProgress
                                          : ncclSuccess;
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
  return enqueue(communicator, stream, {What::kAllReduce, input, output, count, type, op});
}

ncclResult_t ncclReduce(const void* input, void* output, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, {What::kReduce, input, output, count, type, op, root});
}

ncclResult_t ncclReduceScatter(const void* input, void* output, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, {What::kReduceScatter, input, output, count, type, op});
}

ncclResult_t ncclBroadcast(const void* input, void* output, size_t count, ncclDataType_t type,
                           int root, ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream,
                 {What::kBroadcast, input, output, count, type, ncclSum, root});
}

ncclResult_t ncclAllGather(const void* input, void* output, size_t count, ncclDataType_t type,
                           ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, {What::kAllGather, input, output, count, type});
}

ncclResult_t ncclSend(const void* input, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, {What::kSend, input, nullptr, count, type, ncclSum, peer});
}

ncclResult_t ncclRecv(void* output, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t communicator, cudaStream_t stream) {
  return enqueue(communicator, stream, {What::kRecv, nullptr, output, count, type, ncclSum, peer});
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
    auto& windows = member.clique->windows;
    if (windows.size() <= member.windows) windows.resize(member.windows + 1);
    windows[member.windows++].push_back(bytes);
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
  if (std::binary_search(lost.begin(), lost.end(), member.rank)) return ncclInvalidArgument;
  ncclResult_t result = ncclInProgress;
  change([&] {
    if ((flags & NCCL_SHRINK_ABORT) != 0) {
      member.aborted = true;
    } else if (member.is_busy()) {
      blame("a communicator was shrunk with a call on the GPU");
    }
    const int told = gpu_double::nccl_error(member.device);
    if (told != 0) {
      result = static_cast<ncclResult_t>(told);
      return;
    }
    auto& clique = member.clique->without[lost];
    const int size = static_cast<int>(member.clique->members.size()) - count;
    if (clique == nullptr) clique = std::make_shared<Clique>(size);
    const auto before = std::lower_bound(lost.begin(), lost.end(), member.rank) - lost.begin();
    const int rank = member.rank - static_cast<int>(before);
    member.child = {child, std::make_shared<Member>(clique, rank, member.device)};
    clique->members[static_cast<std::size_t>(rank)] = member.child.member.get();
    member.polls = 2;
  });
  return result;
}

#endif

}  // extern "C"
