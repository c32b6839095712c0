#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// Our CUDA kernels on the CPU, by number. Apart from the rest, since CUDA's headers and the words
// that stand in for them (support/cuda_on_cpu.h) do not meet.

namespace gpu_double {

/// -1: there is none of that name.
int kernel_named(const char* name);

unsigned kernel_threads();

/// A copy of what a launch was handed, with the addresses at which steps find device memory.
std::shared_ptr<std::vector<std::byte>> kernel_arguments(int kernel, const void* arguments);

void run_kernel(int kernel, std::uint32_t block_count, const std::vector<std::byte>& arguments);

}  // namespace gpu_double
