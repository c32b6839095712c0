// What stands in for csrc/nccl/ where the headers of CUDA and NCCL were missing when pycomm was
// built: the same functions, saying so.

#include "core/error.h"
#include "nccl/plane.h"
#include "nccl/report.h"

namespace pycomm::nccl {
namespace {

constexpr const char* kWhy = "not in this build (" PYCOMM_GPU_LACKS
                             ").\n  Install a PyTorch for CUDA, whose wheels have the headers, and "
                             "reinstall pycomm-torch.";

}  // namespace

Report report(const Places&) {
  const std::string as_above = "not looked for: see GPU headers";
  return {kWhy, as_above, "", as_above, as_above, false, as_above};
}

std::unique_ptr<Plane> make_plane(const Places&, Transport, MpiProblem) {
  throw CommError(std::string("calls on CUDA tensors: ") + kWhy);
}

}  // namespace pycomm::nccl
