// The stand-in for libcudart.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "double/gpu.h"
#include "double/kernels.h"
#include "double/memory.h"

// CUDA's own names for what it hands out.
struct CUstream_st {
  int device;
  int priority;
  bool held = false;
  std::deque<gpu_double::Step> steps;
};

struct CUevent_st {
  int device;
  std::uint64_t recorded = 0;
  std::uint64_t passed = 0;
};

namespace gpu_double {
namespace {

constexpr int kDevices = 8;
constexpr int kHighestPriority = -5;
/// A starved stream moves when nothing else can and a host thread waits for the GPU, or when
/// nothing else could for so long: longer than any host thread needs to issue its next call.
constexpr auto kPatience = std::chrono::milliseconds(100);

/// Pinned memory of the host, by where it begins: bytes.
using Ranges = std::map<const std::byte*, std::size_t>;

bool lies_in(const Ranges& ranges, const void* address, std::size_t bytes) {
  const auto* const begin = static_cast<const std::byte*>(address);
  auto next = ranges.upper_bound(begin);
  if (next == ranges.begin()) return false;
  const auto& [start, length] = *--next;
  return begin + bytes <= start + length;
}

std::atomic<int> launches{0};

/// All GPUs. Lives as long as the process, as its thread does.
class World {
 public:
  static World& get() {
    static auto* const world = new World;
    return *world;
  }

  template <typename Action>
  auto locked(Action action) {
    std::lock_guard lock(mutex_);
    if constexpr (std::is_void_v<decltype(action())>) {
      action();
      memory.mapped()->bell().ring();
    } else {
      auto result = action();
      memory.mapped()->bell().ring();
      return result;
    }
  }

  // Under the lock.
  Memory memory;
  std::set<cudaStream_t> streams;
  std::set<cudaEvent_t> events;
  std::vector<std::unique_ptr<CUevent_st>> old_events;
  std::size_t old_streams = 0;
  std::size_t old_blocks = 0;
  int communicators = 0;
  int registrations = 0;
  Ranges pinned;
  bool refuses_to_register = false;
  std::chrono::milliseconds patience = kPatience;
  std::array<int, kDevices> waiting_hosts{};
  int starved = kNobody;
  std::pair<std::string, int> forgotten{"", kNobody};
  std::map<std::pair<int, int>, std::size_t> sent;  // bytes, by ranks
  std::string errors;
  std::array<int, kDevices> nccl_versions{};
  std::array<int, kDevices> nccl_errors{};
  std::array<bool, kDevices> without_windows{};
  bool tells_of_lost_processes = false;

 private:
  World() {
    std::thread([this] { run(); }).detach();
  }

  enum class Whose { kFree, kWaitedFor, kStarved };

  void run() {
    Bell& bell = memory.mapped()->bell();
    std::unique_lock lock(mutex_);
    const auto sleep = [&](std::uint32_t heard, auto until) {
      lock.unlock();
      const bool has_rung = bell.wait(heard, until);
      lock.lock();
      return has_rung;
    };
    for (;;) {
      const auto patient_until = std::chrono::steady_clock::now() + patience;
      cudaStream_t stream = nullptr;
      for (bool expired = false; stream == nullptr;) {
        const std::uint32_t heard = bell.rings;  // before looking
        stream = choose(Whose::kFree);
        if (stream == nullptr) stream = choose(Whose::kWaitedFor);
        if (stream != nullptr) break;
        if (choose(Whose::kStarved) == nullptr) {
          sleep(heard, std::nullopt);
          break;  // patience begins anew
        }
        if (expired)
          stream = choose(Whose::kStarved);
        else
          expired = !sleep(heard, patient_until);
      }
      if (stream != nullptr) move(stream);
      lock.unlock();  // let the host in
      lock.lock();
    }
  }

  /// Any stream that can move; null: none of those asked for.
  cudaStream_t choose(Whose whose) {
    std::vector<cudaStream_t> able;
    for (cudaStream_t const stream : streams) {
      if (stream->steps.empty() || stream->held) continue;
      // Even of a starved one: others may wait for its step to come to the head.
      const bool ready = stream->steps.front().ready();
      const bool is_waited_for = waiting_hosts[static_cast<std::size_t>(stream->device)] > 0;
      const bool is_meant =
          stream->priority != starved
              ? whose == Whose::kFree
              : whose == Whose::kStarved || (whose == Whose::kWaitedFor && is_waited_for);
      if (ready && is_meant) able.push_back(stream);
    }
    return able.empty() ? nullptr : able[random_() % able.size()];
  }

  static void move(cudaStream_t stream) {
    const Step step = std::move(stream->steps.front());
    stream->steps.pop_front();
    step.run();
  }

  std::mutex mutex_;
  std::mt19937 random_{1};
};

thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) { return last_error = error; }

bool always() { return true; }

/// A host that was made not to wait for a copy races with it: the thread sanitizer, which would say
/// so, does not see this one.
__attribute__((no_sanitize("thread"))) void copy_unseen(void* to, const void* from,
                                                        std::size_t bytes) {
  auto* const target = static_cast<volatile unsigned char*>(to);
  const auto* const source = static_cast<const unsigned char*>(from);
  for (std::size_t i = 0; i < bytes; ++i) target[i] = source[i];
}

/// Under the lock.
void copy(void* to, const void* from, std::size_t bytes) {
  if (forgotten("cudaEventQuery")) {
    copy_unseen(to, from, bytes);
  } else {
    std::memcpy(to, from, bytes);
  }
}

bool known(cudaStream_t stream) { return World::get().streams.count(stream) != 0; }

}  // namespace

void push(cudaStream_t stream, Step step) {
  World::get().locked([&] { stream->steps.push_back(std::move(step)); });
}

void put_back(cudaStream_t stream, Step step) { stream->steps.push_front(std::move(step)); }

void change(const std::function<void()>& change) {
  World::get().locked([&] { change(); });
}

void* reachable(const void* address) { return World::get().memory.reachable(address); }

std::optional<std::size_t> memory_offset(const void* address) {
  return World::get().memory.offset_of(address);
}

SharedFile::Name memory_name() { return World::get().memory.name(); }

std::shared_ptr<MappedMemory> find_memory(const SharedFile::Name& name) {
  const Memory& own = World::get().memory;
  if (name == own.name()) return own.mapped();
  const auto file = SharedFile::find(name);
  return file ? std::make_shared<MappedMemory>(*file) : nullptr;
}

void blame(const std::string& what) { World::get().errors += what + "\n"; }

int current_device() { return device_of_thread; }

int device_of(cudaStream_t stream) { return stream->device; }

void* allocate(std::size_t bytes) {
  return World::get().locked([&] { return World::get().memory.allocate(bytes); });
}

bool free(void* address) {
  return World::get().locked([&] { return World::get().memory.free(address); });
}

void starve(int priority) {
  World::get().locked([&] { World::get().starved = priority; });
}

void set_patience(std::chrono::milliseconds patience) {
  World::get().locked([&] { World::get().patience = patience; });
}

void refuse_to_register(bool refused) {
  World::get().locked([&] { World::get().refuses_to_register = refused; });
}

void hold(cudaStream_t stream, bool held) {
  World::get().locked([&] { stream->held = held; });
}

void forget(const std::string& function, int priority) {
  World::get().locked([&] { World::get().forgotten = {function, priority}; });
}

bool forgotten(const char* function, int priority) {
  return World::get().forgotten == std::pair<std::string, int>(function, priority);
}

int kernel_launches() { return launches; }

void count_sent(int from, int to, std::size_t bytes) {
  World& world = World::get();
  world.locked([&] { world.sent[{from, to}] += bytes; });
}

std::map<std::pair<int, int>, std::size_t> sent() {
  World& world = World::get();
  return world.locked([&] { return std::exchange(world.sent, {}); });
}

std::string errors() {
  return World::get().locked([] { return std::exchange(World::get().errors, ""); });
}

Census census() {
  World& world = World::get();
  return world.locked([&] {
    return Census{static_cast<int>(world.streams.size() - world.old_streams),
                  static_cast<int>(world.events.size()),
                  static_cast<int>(world.memory.blocks() - world.old_blocks),
                  world.communicators,
                  world.registrations,
                  static_cast<int>(world.pinned.size())};
  });
}

void forgive() {
  World& world = World::get();
  world.locked([&] {
    for (const cudaEvent_t event : world.events) world.old_events.emplace_back(event);
    world.events.clear();
    world.old_streams = world.streams.size();
    world.old_blocks = world.memory.blocks();
    world.communicators = 0;
    world.registrations = 0;
    world.pinned.clear();
  });
}

void count_communicators(int more) { World::get().communicators += more; }

void count_registrations(int more) { World::get().registrations += more; }

void set_nccl_windows(int device, bool known) {
  World::get().locked(
      [&] { World::get().without_windows.at(static_cast<std::size_t>(device)) = !known; });
}

bool nccl_windows(int device) {
  return !World::get().without_windows.at(static_cast<std::size_t>(device));
}

void set_nccl_version(int device, int version) {
  World::get().nccl_versions.at(static_cast<std::size_t>(device)) = version;
}

int nccl_version(int device) {
  return World::get().nccl_versions.at(static_cast<std::size_t>(device));
}

void set_nccl_error(int device, int error) {
  World::get().locked(
      [&] { World::get().nccl_errors.at(static_cast<std::size_t>(device)) = error; });
}

int nccl_error(int device) { return World::get().nccl_errors.at(static_cast<std::size_t>(device)); }

void tell_of_lost_processes(bool told) {
  World::get().locked([&] { World::get().tells_of_lost_processes = told; });
}

bool tells_of_lost_processes() { return World::get().tells_of_lost_processes; }

}  // namespace gpu_double

using gpu_double::always;
using gpu_double::fail;
using gpu_double::known;
using gpu_double::World;

extern "C" {

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = gpu_double::kDevices;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= gpu_double::kDevices) return fail(cudaErrorInvalidDevice);
  gpu_double::device_of_thread = device;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = gpu_double::device_of_thread;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, static_cast<std::size_t>(length), "0000:%02x:00.0", 16 + device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = gpu_double::kHighestPriority;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(gpu_double::last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorNotReady ? "cudaErrorNotReady" : "an error of the double";
}

const char* cudaGetErrorString(cudaError_t) { return "the double refuses"; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  World::get().locked([&] {
    *stream = new CUstream_st{gpu_double::device_of_thread, priority, false, {}};
    World::get().streams.insert(*stream);
  });
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return World::get().locked([&] {
    if (!known(stream)) return fail(cudaErrorInvalidResourceHandle);
    if (!stream->steps.empty()) gpu_double::blame("a stream was destroyed with work on it");
    World::get().streams.erase(stream);
    delete stream;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return World::get().locked(
      [&] { return stream->steps.empty() ? cudaSuccess : fail(cudaErrorNotReady); });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  int& hosts = World::get().waiting_hosts[static_cast<std::size_t>(stream->device)];
  World::get().locked([&] { ++hosts; });
  while (cudaStreamQuery(stream) != cudaSuccess) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  World::get().locked([&] { --hosts; });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  World::get().locked([&] {
    *event = new CUevent_st{gpu_double::device_of_thread};
    World::get().events.insert(*event);
  });
  return cudaSuccess;
}

// As with CUDA, an event that steps still need lives on behind its handle: here for good.
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return World::get().locked([&] {
    if (gpu_double::forgotten("cudaEventDestroy")) return cudaSuccess;
    if (World::get().events.erase(event) == 0) return fail(cudaErrorInvalidResourceHandle);
    World::get().old_events.emplace_back(event);
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return World::get().locked([&] {
    if (!known(stream) || event->device != stream->device ||
        stream->device != gpu_double::device_of_thread) {
      return fail(cudaErrorInvalidResourceHandle);
    }
    stream->steps.push_back({always, [event, number = ++event->recorded] {
                               event->passed = std::max(event->passed, number);
                             }});
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return World::get().locked([&] {
    if (!known(stream)) return fail(cudaErrorInvalidResourceHandle);
    if (gpu_double::forgotten("cudaStreamWaitEvent", stream->priority)) return cudaSuccess;
    const std::uint64_t number = event->recorded;  // what is recorded later does not count
    stream->steps.push_back({[event, number] { return event->passed >= number; }, [] {}});
    return cudaSuccess;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return World::get().locked([&] {
    const bool passed = event->passed >= event->recorded;
    return passed || gpu_double::forgotten("cudaEventQuery") ? cudaSuccess
                                                             : fail(cudaErrorNotReady);
  });
}

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  *address = gpu_double::allocate(bytes);
  return *address != nullptr ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* address) {
  return address == nullptr || gpu_double::free(address) ? cudaSuccess
                                                         : fail(cudaErrorInvalidValue);
}

cudaError_t cudaHostRegister(void* address, std::size_t bytes, unsigned) {
  return World::get().locked([&] {
    World& world = World::get();
    if (world.refuses_to_register) return fail(cudaErrorNotSupported);
    if (!world.pinned.try_emplace(static_cast<const std::byte*>(address), bytes).second) {
      return fail(cudaErrorHostMemoryAlreadyRegistered);
    }
    return cudaSuccess;
  });
}

cudaError_t cudaHostUnregister(void* address) {
  return World::get().locked([&] {
    if (gpu_double::forgotten("cudaHostUnregister")) return cudaSuccess;
    if (World::get().pinned.erase(static_cast<const std::byte*>(address)) == 0) {
      gpu_double::blame("memory was unpinned that was not pinned");
    }
    return cudaSuccess;
  });
}

cudaError_t cudaMallocHost(void** address, std::size_t bytes) {
  *address = std::malloc(bytes);
  World::get().locked(
      [&] { World::get().pinned[static_cast<const std::byte*>(*address)] = bytes; });
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
  cudaHostUnregister(address);
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t stream) {
  if (World::get().locked([] { return gpu_double::forgotten("cudaMemsetAsync"); })) {
    return cudaSuccess;
  }
  gpu_double::push(stream,
                   {always, [=] { std::memset(gpu_double::reachable(address), value, bytes); }});
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const int device = gpu_double::device_of_thread;
  int& hosts = World::get().waiting_hosts[static_cast<std::size_t>(device)];
  const auto idle = [&] {
    return World::get().locked([&] {
      const auto& streams = World::get().streams;
      return std::all_of(streams.begin(), streams.end(), [&](cudaStream_t stream) {
        return stream->device != device || stream->steps.empty();
      });
    });
  };
  World::get().locked([&] { ++hosts; });
  while (!idle()) std::this_thread::sleep_for(std::chrono::microseconds(100));
  World::get().locked([&] { --hosts; });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;  // of no address
  World::get().locked([&] {
    const World& world = World::get();
    // CUDA would wait for such a copy: a training loop may, pycomm must not.
    if (stream->priority != gpu_double::kHighestPriority) return;
    for (const void* const side : {static_cast<const void*>(to), from}) {
      if (world.memory.offset_of(side).has_value() ||
          gpu_double::lies_in(world.pinned, side, bytes))
        continue;
      gpu_double::blame("a copy from or to memory of the host that is not pinned");
    }
  });
  gpu_double::push(stream, {always, [=] {
                              gpu_double::copy(gpu_double::reachable(to),
                                               gpu_double::reachable(from), bytes);
                            }});
  return cudaSuccess;
}

// The kernels of libpycomm_cuda.so run on the CPU; its machine code is taken, and not looked at.

cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**,
                                unsigned, cudaLibraryOption*, void**, unsigned) {
  *library = reinterpret_cast<cudaLibrary_t>(const_cast<void*>(code));
  return cudaSuccess;
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  const int index = gpu_double::kernel_named(name);
  if (index < 0) return fail(cudaErrorSymbolNotFound);
  *kernel = reinterpret_cast<cudaKernel_t>(static_cast<std::intptr_t>(index + 1));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** parameters) {
  const int index = static_cast<int>(reinterpret_cast<std::intptr_t>(kernel)) - 1;
  if (config->blockDim.x != gpu_double::kernel_threads() || config->dynamicSmemBytes != 0) {
    return fail(cudaErrorInvalidConfiguration);
  }
  // The parameters are valid during this call alone.
  auto arguments = gpu_double::kernel_arguments(index, parameters[0]);
  ++gpu_double::launches;
  gpu_double::push(config->stream, {always, [=, blocks = config->gridDim.x] {
                                      gpu_double::run_kernel(index, blocks, *arguments);
                                    }});
  return cudaSuccess;
}

}  // extern "C"
