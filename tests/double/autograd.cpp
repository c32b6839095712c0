// What PyTorch's autograd asks of CUDA. A PyTorch for CPUs has no answer; with this loaded it takes
// the double's GPUs for real ones, and computes each one's part of a backward pass in a thread of
// that GPU, as it does with them.
//
// Includes PyTorch, as nothing in csrc/ does: tests/double_gpu.py builds it for the one at hand.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::Stream;

constexpr c10::DeviceIndex kGpus = 4;

thread_local c10::DeviceIndex current = 0;

/// Each GPU has one stream here: DoubleTensor knows which of the double's that is.
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(type(), current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  Stream exchangeStream(Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kGpus; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kGpus; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
};

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard);
