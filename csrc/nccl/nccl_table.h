#pragma once

#include <nccl.h>

#include <string>
#include <vector>

#include "nccl/library.h"
#include "nccl/versions.h"

// NCCL: every function that pycomm calls, found at run time, typed by nccl.h as in cuda_table.h.

namespace pycomm::nccl {

#define PYCOMM_NCCL_FUNCTIONS(X) \
  X(ncclAllGather)               \
  X(ncclAllReduce)               \
  X(ncclBroadcast)               \
  X(ncclCommAbort)               \
  X(ncclCommDestroy)             \
  X(ncclCommFinalize)            \
  X(ncclCommGetAsyncError)       \
  X(ncclCommInitRankConfig)      \
  X(ncclGetErrorString)          \
  X(ncclGetLastError)            \
  X(ncclGetUniqueId)             \
  X(ncclGetVersion)              \
  X(ncclGroupEnd)                \
  X(ncclGroupStart)              \
  X(ncclRecv)                    \
  X(ncclRedOpCreatePreMulSum)    \
  X(ncclRedOpDestroy)            \
  X(ncclReduce)                  \
  X(ncclReduceScatter)           \
  X(ncclSend)

/// Newer than kOldest; null where NCCL has none.
#define PYCOMM_NCCL_NEWER_FUNCTIONS(X) \
  X(ncclCommDeregister)                \
  X(ncclCommRegister)                  \
  X(ncclCommShrink)                    \
  X(ncclCommWindowDeregister)          \
  X(ncclCommWindowRegister)            \
  X(ncclMemAlloc)                      \
  X(ncclMemFree)

struct NcclTable {
  static constexpr int kOldest = NCCL_VERSION(2, 18, 0);

  /// @param folders  of wheels, where a libnccl may be.
  /// @throws CommError  there is none, or it is older than kOldest or lacks a function.
  static NcclTable load(const std::vector<std::string>& folders);

  const Library library;
  int version = 0;

#define PYCOMM_NCCL_MEMBER(function) decltype(&::function) function = nullptr;
  PYCOMM_NCCL_FUNCTIONS(PYCOMM_NCCL_MEMBER)
  PYCOMM_NCCL_NEWER_FUNCTIONS(PYCOMM_NCCL_MEMBER)
#undef PYCOMM_NCCL_MEMBER

  /// Of what came after kOldest and concerns pycomm, in the order of its coming: what this NCCL
  /// has, or what it lacks.
  std::vector<std::string> newer(bool present) const;
};

}  // namespace pycomm::nccl
