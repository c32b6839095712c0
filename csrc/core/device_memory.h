#pragma once

#include <cstddef>

namespace pycomm {

/// Memory on a GPU, for buckets. It lives as long as somebody holds it, and longer than the group
/// it was made in if need be.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  /// The GPU, as CUDA numbers them here.
  int device() const { return device_; }

 protected:
  DeviceMemory(std::byte* data, std::size_t bytes, int device)
      : data_(data), bytes_(bytes), device_(device) {}

 private:
  std::byte* const data_;
  const std::size_t bytes_;
  const int device_;
};

}  // namespace pycomm
