#pragma once

#include <cstdint>

namespace pycomm {

/// A CUDA stream as its address; 0 is the default stream.
using StreamAddress = std::uintptr_t;

/// A collective on GPU memory, as the one who issued it sees it. The operation is over once it was
/// launched; the GPU comes to it later.
class DeviceCall {
 public:
  virtual ~DeviceCall() = default;

  /// The GPU, as CUDA numbers them here.
  virtual int device() const = 0;

  /// What is put on `stream` from now on waits until the GPU has finished the call. Does not wait
  /// itself. Only after the operation has ended without an error.
  virtual void order_before(StreamAddress stream) = 0;

  /// Whether the GPU has finished the call. Only after the operation has ended without an error.
  virtual bool finished() const = 0;
};

}  // namespace pycomm
