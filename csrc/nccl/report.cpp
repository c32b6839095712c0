#include "nccl/report.h"

#include "core/error.h"
#include "nccl/cuda_table.h"
#include "nccl/kernel_image.h"
#include "nccl/nccl_table.h"

namespace pycomm::nccl {
namespace {

template <typename Look>
std::string found_or_why(Look look) {
  try {
    return look();
  } catch (const CommError& error) {
    return error.what();
  }
}

std::string where(const Library& library) {
  return library.path() + " (" + std::string(library.origin()) + ")";
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string driver_of(const CudaTable& cuda) {
  return found_or_why([&] {
    const int count = cuda.device_count();
    return "for CUDA " + cuda_version_text(cuda.driver_version()) + ", " + std::to_string(count) +
           (count == 1 ? " GPU" : " GPUs");
  });
}

std::string nccl_of(const NcclTable& nccl) {
  const auto has = nccl.newer(/*present=*/true);
  const auto lacks = nccl.newer(/*present=*/false);
  return nccl_version_text(nccl.version) + ", " + where(nccl.library) +
         (has.empty() ? "" : "; has " + listed(has)) +
         (lacks.empty() ? "" : "; lacks " + listed(lacks));
}

std::string kernels_at(const std::string& path, const CudaTable* cuda) {
  return found_or_why([&] {
    const std::string built_by = KernelImage(path).image().built_by;
    const bool loadable = cuda == nullptr || cuda->loads_kernels();
    return "built by " + built_by +
           (loadable ? "" : "; this CUDA runtime cannot load them, 12.8 can");
  });
}

}  // namespace

Report report(const Places& places) {
  Report report;
  report.headers = "CUDA " + cuda_version_text(CUDART_VERSION) + ", NCCL " +
                   nccl_version_text(NCCL_VERSION_CODE);
  const std::string unknown = "unknown without a CUDA runtime";
  report.driver = unknown;
  report.kernels = kernels_at(places.kernels, nullptr);
  report.runtime = found_or_why([&] {
    const CudaTable cuda = CudaTable::load(places.cuda_folders);
    report.runtime_file = cuda.library.path();
    report.driver = driver_of(cuda);
    report.kernels = kernels_at(places.kernels, &cuda);
    return cuda_version_text(cuda.version) + ", " + where(cuda.library);
  });
  report.nccl = found_or_why([&] {
    std::string text = nccl_of(NcclTable::load(places.nccl_folders));
    report.has_nccl = true;
    return text;
  });
  return report;
}

}  // namespace pycomm::nccl
