#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <vector>

#include "nccl/library.h"
#include "nccl/versions.h"

// The CUDA runtime: every function that pycomm calls, found at run time. Their types are those of
// the header, so that a changed signature does not compile.

namespace pycomm::nccl {

#define PYCOMM_CUDA_FUNCTIONS(X)      \
  X(cudaDeviceGetPCIBusId)            \
  X(cudaDeviceGetStreamPriorityRange) \
  X(cudaDeviceSynchronize)            \
  X(cudaDriverGetVersion)             \
  X(cudaEventCreateWithFlags)         \
  X(cudaEventDestroy)                 \
  X(cudaEventQuery)                   \
  X(cudaEventRecord)                  \
  X(cudaFree)                         \
  X(cudaFreeHost)                     \
  X(cudaGetDevice)                    \
  X(cudaGetDeviceCount)               \
  X(cudaGetErrorName)                 \
  X(cudaGetErrorString)               \
  X(cudaGetLastError)                 \
  X(cudaHostRegister)                 \
  X(cudaHostUnregister)               \
  X(cudaLaunchKernelExC)              \
  X(cudaMemcpyAsync)                  \
  X(cudaMemsetAsync)                  \
  X(cudaRuntimeGetVersion)            \
  X(cudaSetDevice)                    \
  X(cudaStreamCreateWithPriority)     \
  X(cudaStreamDestroy)                \
  X(cudaStreamWaitEvent)

/// Those that cuda_runtime.h, which nccl.h includes, overloads: their types are written out.
#define PYCOMM_CUDA_OVERLOADED_FUNCTIONS(X) \
  X(cudaMalloc)                             \
  X(cudaMallocHost)
using cudaMallocType = cudaError_t(void**, std::size_t);
using MallocIsOfThatType = decltype(static_cast<cudaMallocType*>(&::cudaMalloc));
using cudaMallocHostType = cudaError_t(void**, std::size_t);
using MallocHostIsOfThatType = decltype(static_cast<cudaMallocHostType*>(&::cudaMallocHost));

/// Since 12.8; null before. Without them no kernel of ours can be loaded.
#define PYCOMM_CUDA_LIBRARY_FUNCTIONS(X) \
  X(cudaLibraryGetKernel)                \
  X(cudaLibraryLoadData)

struct CudaTable {
  static constexpr int kOldest = 12000;  // as CUDA writes 12.0

  /// @param folders  of wheels, where a libcudart may be.
  /// @throws CommError  there is none, or it is older than kOldest or lacks a function.
  static CudaTable load(const std::vector<std::string>& folders);

  const Library library;
  int version = 0;

#define PYCOMM_CUDA_MEMBER(function) decltype(&::function) function = nullptr;
  PYCOMM_CUDA_FUNCTIONS(PYCOMM_CUDA_MEMBER)
  PYCOMM_CUDA_LIBRARY_FUNCTIONS(PYCOMM_CUDA_MEMBER)
#undef PYCOMM_CUDA_MEMBER
#define PYCOMM_CUDA_MEMBER(function) function##Type* function = nullptr;
  PYCOMM_CUDA_OVERLOADED_FUNCTIONS(PYCOMM_CUDA_MEMBER)
#undef PYCOMM_CUDA_MEMBER

  bool loads_kernels() const {
    return cudaLibraryLoadData != nullptr && cudaLibraryGetKernel != nullptr;
  }

  /// @throws CommError  "`call` failed: ..." unless `result` is cudaSuccess.
  void check(cudaError_t result, const char* call) const;

  /// The newest CUDA that the driver knows, as CUDA writes it; 0: there is no driver.
  int driver_version() const;

  /// @throws CommError  no driver, one too old for this runtime, or no GPU; with the remedy.
  int device_count() const;
};

}  // namespace pycomm::nccl
