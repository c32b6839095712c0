#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "core/device_call.h"
#include "core/error.h"
#include "core/task.h"
#include "nccl/cards.h"
#include "nccl/cuda_table.h"
#include "nccl/kernel_image.h"
#include "nccl/launch_order.h"
#include "nccl/nccl_table.h"
#include "nccl/report.h"

namespace pycomm::nccl {

/// The GPU of this process, and what all groups' calls on it share.
class Device {
 public:
  /// @throws CommError  no CUDA runtime, no driver, or no such GPU.
  Device(const Places& places, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  /// Makes the GPU the calling thread's current one, as long as it lives.
  class Current {
   public:
    explicit Current(const Device& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Device& device_;
    int before_ = 0;
  };

  /// What this rank shows the others.
  /// @param makes_id  it is the one that brings the unique id.
  Card card(bool makes_id) const;

  /// Our kernels, loaded when first asked for. Calls from any thread.
  /// @param problem  unless null, is set to why they cannot be loaded: there is no result then.
  const Kernels* kernels(std::string* problem = nullptr) const;

  /// `scratch_bytes` that calls use one after the other, in the order of `stream`. Of the progress
  /// thread.
  /// @throws CommError  there is not so much memory left.
  std::byte* scratch() const;

  /// Memory of this GPU.
  /// @param purpose  for errors: what it is for.
  /// @throws CommError  there is not so much left.
  std::byte* allocate(std::size_t bytes, const std::string& purpose) const;
  /// The error of that.
  CommError no_memory(std::size_t bytes, const std::string& purpose,
                      const std::string& cause) const;

  const CudaTable cuda;
  const int ordinal;
  const std::size_t scratch_bytes;
  /// What NCCL knows it by.
  std::string bus_id;
  /// Empty, and why, where there is no usable NCCL: the other ranks have to hear of it.
  std::optional<NcclTable> nccl;
  std::string nccl_problem;
  /// On which all groups' calls run, before anything else on the GPU.
  cudaStream_t stream = nullptr;
  /// Of the progress thread.
  LaunchOrder order;
  /// Whether this rank has ever begun a message from or to its GPU.
  std::atomic<bool> has_messages = false;

 private:
  const std::string kernels_path_;
  mutable std::once_flag kernels_tried_;
  mutable std::optional<Kernels> kernels_;
  mutable std::string kernels_problem_;
  mutable std::byte* scratch_ = nullptr;
};

inline cudaStream_t stream_at(StreamAddress address) {
  return reinterpret_cast<cudaStream_t>(address);
}

/// Work in order on this rank's GPU, before that of the training loop, and at the same time as that
/// of other streams.
class Stream {
 public:
  explicit Stream(std::shared_ptr<const Device> device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t handle() const { return stream_; }
  const std::shared_ptr<const Device>& device() const { return device_; }

 private:
  const std::shared_ptr<const Device> device_;
  cudaStream_t stream_ = nullptr;
};

/// A point in the work of a stream.
class Event {
 public:
  explicit Event(std::shared_ptr<const Device> device);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream);
  /// What is put on `stream` from now on waits for what was recorded last.
  void order_before(cudaStream_t stream) const;
  /// Whether the GPU has come by.
  /// @throws CommError  a kernel has failed: the GPU is lost to this process.
  bool passed() const;

 private:
  const std::shared_ptr<const Device> device_;
  cudaEvent_t event_ = nullptr;
};

/// Waits until the GPU has come by an event.
class Passed final : public Wait {
 public:
  /// @param awaited  for errors; a literal.
  Passed(const Event& event, const char* awaited) : event_(event), awaited_(awaited) {}
  bool poll() override { return event_.passed(); }
  std::string describe() const override { return awaited_; }
  bool rings_doorbell() const override { return false; }

 private:
  const Event& event_;
  const char* const awaited_;
};

/// What passes between the issuer of a call and the progress thread that launches it.
class Call final : public DeviceCall {
 public:
  /// The call comes after what is on `stream` by now.
  Call(std::shared_ptr<const Device> device, StreamAddress stream);

  int device() const override { return device_->ordinal; }
  void order_before(StreamAddress stream) override;
  bool finished() const override { return done_.passed(); }

  /// The launch, on the device's stream, lies between these two.
  void begin() { begin_on(device_->stream); }
  void end() { end_on(device_->stream); }
  /// The same where a call has streams of its own: it begins on each, and ends on one.
  void begin_on(cudaStream_t stream) { ready_.order_before(stream); }
  void end_on(cudaStream_t stream) { done_.record(stream); }

 private:
  const std::shared_ptr<const Device> device_;
  Event ready_{device_};
  Event done_{device_};
};

}  // namespace pycomm::nccl
