#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace pycomm::nccl {

/// Where the GPU plane's libraries may lie, beside the places the dynamic loader knows, and what it
/// may take.
struct Places {
  std::vector<std::string> cuda_folders;
  std::vector<std::string> nccl_folders;
  /// libpycomm_cuda.so.
  std::string kernels;
  /// Of the GPU's memory, for all reductions in exact order; the smallest of a group's ranks holds.
  std::size_t scratch_bytes = 32 << 20;
};

/// What carries the calls on GPUs.
enum class Transport {
  kAuto,    // NCCL if every rank has it; if none has, kMpi where that can be; else kStaged
  kNccl,    // NCCL, or an error that says what it lacks
  kStaged,  // the collectives of the host, through its memory
  kMpi,     // between hosts MPI from and to GPU memory, or an error; inside one, kStaged
};

/// Why this process's MPI takes no pointers to GPU memory; empty: it does. May take seconds.
using MpiProblem = std::function<std::string()>;

/// What of the GPU plane is here. Each text is one line, or two where a problem has a remedy.
struct Report {
  std::string headers;  // that this build was typed from
  std::string runtime;
  std::string runtime_file;  // empty: none
  std::string driver;        // and its GPUs
  std::string nccl;
  bool has_nccl = false;  // and it can be used
  std::string kernels;
};

/// Look for everything. Loads the libraries, asks the driver for its GPUs, and starts nothing.
Report report(const Places& places);

}  // namespace pycomm::nccl
