#include "nccl/cuda_table.h"

#include "core/error.h"

namespace pycomm::nccl {

CudaTable CudaTable::load(const std::vector<std::string>& folders) {
  CudaTable table{Library::find(
      {"CUDA runtime",
       "PYCOMM_CUDART_LIBRARY",
       {"libcudart.so.13", "libcudart.so.12"},
       folders,
       "Install a PyTorch for CUDA, which brings it, or name the file in PYCOMM_CUDART_LIBRARY."})};
  const std::string& path = table.library.path();
#define PYCOMM_CUDA_RESOLVE(function) \
  table.function = reinterpret_cast<decltype(table.function)>(table.library.symbol(#function));
#define PYCOMM_CUDA_REQUIRE(function)                                                    \
  PYCOMM_CUDA_RESOLVE(function)                                                          \
  if (table.function == nullptr) {                                                       \
    throw CommError("CUDA runtime: " + path +                                            \
                    " has no " #function ".\n  It is no libcudart, or one older than " + \
                    cuda_version_text(kOldest) +                                         \
                    ". Install a PyTorch for a newer CUDA, or "                          \
                    "name another file in PYCOMM_CUDART_LIBRARY.");                      \
  }
  PYCOMM_CUDA_FUNCTIONS(PYCOMM_CUDA_REQUIRE)
  PYCOMM_CUDA_OVERLOADED_FUNCTIONS(PYCOMM_CUDA_REQUIRE)
  PYCOMM_CUDA_LIBRARY_FUNCTIONS(PYCOMM_CUDA_RESOLVE)
#undef PYCOMM_CUDA_REQUIRE
#undef PYCOMM_CUDA_RESOLVE
  table.check(table.cudaRuntimeGetVersion(&table.version), "cudaRuntimeGetVersion");
  if (table.version < kOldest) {
    throw CommError("CUDA runtime: " + path + " is version " + cuda_version_text(table.version) +
                    ", and pycomm needs " + cuda_version_text(kOldest) +
                    " or newer.\n  Install a PyTorch for a newer CUDA.");
  }
  return table;
}

void CudaTable::check(cudaError_t result, const char* call) const {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // so that PyTorch does not find our error
  throw CommError(std::string("CUDA: ") + call + " failed: " + cudaGetErrorName(result) + ", " +
                  cudaGetErrorString(result) + " (CUDA runtime " + cuda_version_text(version) +
                  ", " + library.path() + ").");
}

int CudaTable::driver_version() const {
  int found = 0;
  check(cudaDriverGetVersion(&found), "cudaDriverGetVersion");
  return found;
}

int CudaTable::device_count() const {
  const int driver = driver_version();
  if (driver == 0) {
    throw CommError(
        "no NVIDIA driver is loaded, so no GPU can be used.\n  Install one (nvidia-smi shows it), "
        "or start the container with GPUs: docker run --gpus all. CPU tensors need none.");
  }
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    throw CommError("the NVIDIA driver is too old: it knows CUDA " + cuda_version_text(driver) +
                    ", and the CUDA runtime is " + cuda_version_text(version) + " (" +
                    library.path() + ").\n  Update the driver, or install a PyTorch for CUDA " +
                    std::to_string(driver / 1000) + ".");
  }
  if (result == cudaErrorNoDevice || (result == cudaSuccess && count == 0)) {
    cudaGetLastError();
    throw CommError(
        "the NVIDIA driver shows this process no GPU.\n  Look at nvidia-smi and at "
        "CUDA_VISIBLE_DEVICES. CPU tensors need none.");
  }
  check(result, "cudaGetDeviceCount");
  return count;
}

}  // namespace pycomm::nccl
