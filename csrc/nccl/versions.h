#pragma once

#include <string>

namespace pycomm::nccl {

/// "12.8" for CUDA's 12080.
inline std::string cuda_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

/// "2.32.3" for NCCL's 23203. Up to 2.8 it wrote 2804 for 2.8.4.
inline std::string nccl_version_text(int version) {
  const int scale = version < 10000 ? 1000 : 10000;
  return std::to_string(version / scale) + "." + std::to_string(version % scale / 100) + "." +
         std::to_string(version % 100);
}

}  // namespace pycomm::nccl
