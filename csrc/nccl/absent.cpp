// What stands in for csrc/nccl/ where the headers of CUDA and NCCL were missing when pycomm was
// built: the same functions, saying so.

#include "nccl/report.h"

namespace pycomm::nccl {

Report report(const Places&) {
  const std::string why = "not in this build (" PYCOMM_GPU_LACKS
                          ").\n  Install a PyTorch for CUDA, whose wheels have the headers, and "
                          "reinstall pycomm-torch.";
  const std::string as_above = "not looked for: see GPU headers";
  return {why, as_above, as_above, as_above, as_above};
}

}  // namespace pycomm::nccl
