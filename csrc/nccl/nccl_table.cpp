#include "nccl/nccl_table.h"

#include "core/error.h"

namespace pycomm::nccl {

NcclTable NcclTable::load(const std::vector<std::string>& folders) {
  NcclTable table{Library::find({"NCCL",
                                 "PYCOMM_NCCL_LIBRARY",
                                 {"libnccl.so.2"},
                                 folders,
                                 "Install a PyTorch for CUDA, which brings it, or "
                                 "nvidia-nccl-cu13, or name the file in PYCOMM_NCCL_LIBRARY."})};
  const std::string& path = table.library.path();
  const std::string remedy =
      "\n  Install " + nccl_version_text(kOldest) +
      " or newer (a newer PyTorch for CUDA brings one), or name it in PYCOMM_NCCL_LIBRARY.";
#define PYCOMM_NCCL_RESOLVE(function) \
  table.function = reinterpret_cast<decltype(table.function)>(table.library.symbol(#function));
  PYCOMM_NCCL_FUNCTIONS(PYCOMM_NCCL_RESOLVE)
  PYCOMM_NCCL_NEWER_FUNCTIONS(PYCOMM_NCCL_RESOLVE)
#undef PYCOMM_NCCL_RESOLVE
  if (table.ncclGetVersion == nullptr || table.ncclGetVersion(&table.version) != ncclSuccess) {
    throw CommError("NCCL: " + path + " does not tell its version, so it is no NCCL." + remedy);
  }
  if (table.version < kOldest) {
    throw CommError("NCCL: " + path + " is version " + nccl_version_text(table.version) +
                    ", and pycomm needs " + nccl_version_text(kOldest) + "." + remedy);
  }
#define PYCOMM_NCCL_REQUIRE(function)                                                   \
  if (table.function == nullptr) {                                                      \
    throw CommError("NCCL: " + path + ", version " + nccl_version_text(table.version) + \
                    ", has no " #function "." + remedy);                                \
  }
  PYCOMM_NCCL_FUNCTIONS(PYCOMM_NCCL_REQUIRE)
#undef PYCOMM_NCCL_REQUIRE
  return table;
}

std::vector<std::string> NcclTable::newer(bool present) const {
  std::vector<std::string> names;
  for (const char* name :
       {"ncclCommRegister", "ncclMemAlloc", "ncclCommInitRankScalable", "ncclCommWindowRegister",
        "ncclCommShrink", "ncclAlltoAll", "ncclCommRevoke", "ncclCommGrow"}) {
    if ((library.symbol(name) != nullptr) == present) names.emplace_back(name);
  }
  return names;
}

}  // namespace pycomm::nccl
