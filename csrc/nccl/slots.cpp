#include "nccl/slots.h"

#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

#include "core/error.h"

namespace pycomm::nccl {
namespace {

/// How long the end of a failed group waits for a GPU that may hang.
constexpr auto kPatience = std::chrono::seconds(1);

}  // namespace

Slots::GpuMemory::GpuMemory(std::shared_ptr<const Device> device, std::size_t bytes)
    : data(device->allocate(bytes, "what goes to other ranks")), device_(std::move(device)) {}

// What fails here fails because the GPU, or all of CUDA, is gone before us.
Slots::GpuMemory::~GpuMemory() {
  if (frees) device_->cuda.cudaFree(data);
}

Slots::Slots(const std::shared_ptr<const Device>& device, std::size_t slot_bytes)
    : device_(device),
      down_(device),
      up_(device),
      slot_bytes_(slot_bytes),
      memory_bytes_(kCount * slot_bytes) {}

std::unique_ptr<Slots> Slots::on_host(const std::shared_ptr<const Device>& device, Arena& arena,
                                      std::size_t slot_bytes) {
  std::unique_ptr<Slots> slots(new Slots(device, slot_bytes));
  slots->on_host_.emplace(device, arena, slots->memory_bytes_);
  return slots;
}

std::unique_ptr<Slots> Slots::on_gpu(const std::shared_ptr<const Device>& device,
                                     std::size_t slot_bytes, std::size_t scratch_bytes) {
  std::unique_ptr<Slots> slots(new Slots(device, slot_bytes));
  slots->memory_bytes_ += scratch_bytes;
  slots->on_gpu_.emplace(device, slots->memory_bytes_);
  return slots;
}

void Slots::begin(Call& call) {
  call.begin_on(down_.handle());
  call.begin_on(up_.handle());
}

void Slots::follow(Call& earlier) {
  earlier.order_before(reinterpret_cast<StreamAddress>(down_.handle()));
  earlier.order_before(reinterpret_cast<StreamAddress>(up_.handle()));
}

void Slots::copy_down(std::span<const Pieces::Copy> copies, std::size_t piece) {
  if (copies.empty()) return;  // this rank brings nothing, and need not wait for its GPU
  at(piece).emptied.order_before(down_.handle());
  copy(copies, on_gpu_ ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost, down_);
  at(piece).filled.record(down_.handle());
}

void Slots::copy_up(std::span<const Pieces::Copy> copies, std::size_t piece) {
  copy(copies, on_gpu_ ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice, up_);
  at(piece).emptied.record(up_.handle());
}

void Slots::up_follows(cudaStream_t stream) {
  Event point(device_);
  point.record(stream);
  point.order_before(up_.handle());
}

void Slots::copy(std::span<const Pieces::Copy> copies, cudaMemcpyKind kind, const Stream& on) {
  const Device::Current current(*device_);
  const CudaTable& cuda = device_->cuda;
  for (const Pieces::Copy& copy : copies) {
    cuda.check(cuda.cudaMemcpyAsync(copy.to, copy.from, copy.bytes, kind, on.handle()),
               "cudaMemcpyAsync");
  }
}

void Slots::quarantine() {
  if (on_host_) on_host_->quarantine();
  if (on_gpu_) on_gpu_->frees = false;
}

bool Slots::idle() const {
  try {
    Event last_down(device_);
    last_down.record(down_.handle());
    Event last_up(device_);
    last_up.record(up_.handle());
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!(last_down.passed() && last_up.passed())) {
      if (std::chrono::steady_clock::now() > end) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  } catch (const CommError&) {
    return false;  // the GPU, or all of CUDA, is gone before us
  }
}

bool Slots::leave(std::unique_ptr<Slots> slots, bool aborted) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<std::unique_ptr<Slots>>();  // never destroyed
  if (slots == nullptr) return true;                                    // nothing was ever copied
  if (aborted) slots->quarantine();
  if (slots->idle()) return true;
  std::lock_guard lock(mutex);
  kept->push_back(std::move(slots));
  return false;
}

}  // namespace pycomm::nccl
