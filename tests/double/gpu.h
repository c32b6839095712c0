#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "double/memory.h"

// A stand-in for GPUs, for tests: libcudart (cudart.cpp) and libnccl (nccl.cpp) as shared libraries
// that the tables of csrc/nccl/ load like the real ones. Nothing here has seen a GPU.
//
// A stream is a queue of steps. One thread takes steps from the heads of all streams, in an order
// that a test makes as bad as it can: whichever streams are starved move only when nothing else
// can, and a host thread waits for their GPU or nothing has moved for long. "Device" memory is
// never mapped for the host: to touch it is a segmentation fault. Steps reach it under a second
// address.
//
// The ranks that share these GPUs are threads of one process, or processes of one host, each with
// its streams and its memory; each rank has one GPU. NCCL alone knows of the others (clique.h).

namespace gpu_double {

/// One step of a stream. It waits at the head of its stream until `ready`, then runs at once.
/// Both are called by the one thread that moves all streams, so they need no lock against another.
struct Step {
  std::function<bool()> ready;
  std::function<void()> run;
};

/// Put a step behind what is on the stream.
void push(cudaStream_t stream, Step step);

/// By a step that runs and finds that it cannot after all: another process has come between. It
/// waits again, as `step`.
void put_back(cudaStream_t stream, Step step);

/// Run `change` while no step runs, then look at all streams again.
void change(const std::function<void()>& change);

/// Where steps find device memory; host memory is where it is.
void* reachable(const void* address);

/// Device memory as other processes know it: where it lies in it, if it does, and its name.
std::optional<std::size_t> memory_offset(const void* address);
SharedFile::Name memory_name();
/// That of any process; null: it is gone.
std::shared_ptr<MappedMemory> find_memory(const SharedFile::Name& name);

/// Something is wrong that a real GPU would not tell, or not in time: kept for errors().
void blame(const std::string& what);

int current_device();
int device_of(cudaStream_t stream);

/// Memory on the current GPU; null: there is no more.
void* allocate(std::size_t bytes);
bool free(void* address);

// For tests.

/// Streams of this priority (lower numbers go first) move only when no other can.
void starve(int priority);
constexpr int kNobody = 1 << 20;

/// How long a starved stream waits when nothing else can move; 100 ms unless told.
void set_patience(std::chrono::milliseconds patience);

/// From now on CUDA refuses to pin memory that is not its own, or no more.
void refuse_to_register(bool refused);

/// The stream stops before its next step: a GPU that hangs.
void hold(cudaStream_t stream, bool held);

/// From now on this function does nothing, as if whoever calls it did not: a test that still passes
/// without a line tests nothing of it. If it has a stream, only on those of this priority. "" ends
/// that.
void forget(const std::string& function, int priority = kNobody);
bool forgotten(const char* function, int priority = kNobody);

/// Kernels that were started so far.
int kernel_launches();

/// By whoever carries messages: one from a rank to a rank.
void count_sent(int from, int to, std::size_t bytes);
/// What has been counted since the last time.
std::map<std::pair<int, int>, std::size_t> sent();

/// What has been blamed since the last time, one line each.
std::string errors();

/// What exists and was not destroyed.
struct Census {
  int streams;
  int events;
  int allocations;
  int communicators;
  int registrations;  // of memory, with communicators
  int pinned;         // blocks of host memory
};
Census census();
/// Count nothing that exists now.
void forgive();
/// By whoever makes and frees communicators.
void count_communicators(int more);
/// By whoever makes memory known to communicators and makes them forget it.
void count_registrations(int more);

/// Whether NCCL knows windows between the GPUs; if not, on this GPU.
void set_nccl_windows(int device, bool known);
bool nccl_windows(int device);

/// The version that the stand-in for NCCL claims on a GPU.
void set_nccl_version(int device, int version);
int nccl_version(int device);

/// What NCCL says has become of every communicator on a GPU (a ncclResult_t); 0: the truth.
void set_nccl_error(int device, int error);
int nccl_error(int device);

/// Whether NCCL says so when a rank's process is gone. At first it does not, and calls with that
/// rank hang: nobody may count on it.
void tell_of_lost_processes(bool told);
bool tells_of_lost_processes();

}  // namespace gpu_double
