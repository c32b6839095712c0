// What tests in Python need of the stand-in for GPUs (gpu.h), for ctypes.

#include <cstddef>
#include <string>

#include "double/gpu.h"

extern "C" {

void* gpu_double_reachable(const void* address) { return gpu_double::reachable(address); }

void gpu_double_starve(int priority) { gpu_double::starve(priority); }

void gpu_double_hold(cudaStream_t stream, bool held) { gpu_double::hold(stream, held); }

void gpu_double_forget(const char* function, int priority) {
  gpu_double::forget(function, priority);
}

int gpu_double_kernel_launches() { return gpu_double::kernel_launches(); }

/// What has been blamed since the last time; valid until the next call.
const char* gpu_double_errors() {
  static std::string errors;
  errors = gpu_double::errors();
  return errors.c_str();
}

}  // extern "C"
