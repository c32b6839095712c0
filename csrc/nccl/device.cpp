#include "nccl/device.h"

#include <cstring>
#include <utility>

#include "core/error.h"

namespace pycomm::nccl {
namespace {

/// On the current GPU.
cudaStream_t make_stream(const CudaTable& cuda) {
  int lowest = 0;
  int highest = 0;  // the smaller number
  cuda.check(cuda.cudaDeviceGetStreamPriorityRange(&lowest, &highest),
             "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  // Non-blocking: not ordered with the default stream but by our events.
  cuda.check(cuda.cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest),
             "cudaStreamCreateWithPriority");
  return stream;
}

}  // namespace

Device::Device(const Places& places, int ordinal_in)
    : cuda(CudaTable::load(places.cuda_folders)),
      ordinal(ordinal_in),
      scratch_bytes(places.scratch_bytes),
      kernels_path_(places.kernels) {
  if (const int count = cuda.device_count(); ordinal < 0 || ordinal >= count) {
    throw CommError("there is no GPU " + std::to_string(ordinal) + " among the " +
                    std::to_string(count) + " of this process.");
  }
  const Current current(*this);
  char text[20] = "";
  cuda.check(cuda.cudaDeviceGetPCIBusId(text, sizeof(text), ordinal), "cudaDeviceGetPCIBusId");
  bus_id = text;
  try {
    nccl.emplace(NcclTable::load(places.nccl_folders));
  } catch (const CommError& error) {
    nccl_problem = error.what();
  }
  stream = make_stream(cuda);
}

// What fails here fails because the GPU, or all of CUDA, is gone before us.
Device::~Device() {
  if (scratch_ != nullptr) cuda.cudaFree(scratch_);
  cuda.cudaStreamDestroy(stream);
}

Card Device::card(bool makes_id) const {
  Card card;
  card.set_bus_id(bus_id);
  card.scratch_bytes = scratch_bytes;
  std::string kernels_problem;
  kernels(&kernels_problem);
  card.set_kernels_problem(kernels_problem);
  if (!nccl) {
    card.set_problem(nccl_problem);
    return card;
  }
  card.nccl_version = nccl->version;
  ncclUniqueId id{};
  static_assert(sizeof(id.internal) == sizeof(card.unique_id));
  if (makes_id) {
    const ncclResult_t result = nccl->ncclGetUniqueId(&id);
    if (result != ncclSuccess) {
      card.set_problem(std::string("ncclGetUniqueId failed: ") + nccl->ncclGetErrorString(result) +
                       ". NCCL_DEBUG=WARN makes NCCL say more.");
    }
  }
  std::memcpy(card.unique_id.data(), id.internal, sizeof(id.internal));
  return card;
}

const Kernels* Device::kernels(std::string* problem) const {
  std::call_once(kernels_tried_, [this] {
    try {
      const Current current(*this);
      const KernelImage image(kernels_path_);
      kernels_.emplace(cuda, image);
    } catch (const CommError& error) {
      kernels_problem_ = error.what();
    }
  });
  if (problem != nullptr) *problem = kernels_problem_;
  return kernels_ ? &*kernels_ : nullptr;
}

std::byte* Device::scratch() const {
  if (scratch_ == nullptr) {
    scratch_ = allocate(scratch_bytes, "what a reduction in exact order receives");
  }
  return scratch_;
}

std::byte* Device::allocate(std::size_t bytes, const std::string& purpose) const {
  const Current current(*this);
  void* address = nullptr;
  if (const cudaError_t result = cuda.cudaMalloc(&address, bytes); result != cudaSuccess) {
    cuda.cudaGetLastError();  // so that PyTorch does not find our error
    throw no_memory(bytes, purpose, std::string("cudaMalloc: ") + cuda.cudaGetErrorString(result));
  }
  return static_cast<std::byte*>(address);
}

CommError Device::no_memory(std::size_t bytes, const std::string& purpose,
                            const std::string& cause) const {
  return CommError("GPU " + std::to_string(ordinal) + " has no " + std::to_string(bytes) +
                   " bytes left for " + purpose + " (" + cause +
                   ").\n  torch.cuda.empty_cache() gives back what PyTorch keeps; smaller batches "
                   "need less.");
}

Device::Current::Current(const Device& device) : device_(device) {
  device.cuda.check(device.cuda.cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device.ordinal) {
    device.cuda.check(device.cuda.cudaSetDevice(device.ordinal), "cudaSetDevice");
  }
}

Device::Current::~Current() {
  if (before_ != device_.ordinal) device_.cuda.cudaSetDevice(before_);
}

Stream::Stream(std::shared_ptr<const Device> device) : device_(std::move(device)) {
  const Device::Current current(*device_);
  stream_ = make_stream(device_->cuda);
}

Stream::~Stream() { device_->cuda.cudaStreamDestroy(stream_); }

Event::Event(std::shared_ptr<const Device> device) : device_(std::move(device)) {
  const Device::Current current(*device_);
  device_->cuda.check(device_->cuda.cudaEventCreateWithFlags(&event_, cudaEventDisableTiming),
                      "cudaEventCreateWithFlags");
}

Event::~Event() { device_->cuda.cudaEventDestroy(event_); }

void Event::record(cudaStream_t stream) {
  const Device::Current current(*device_);
  device_->cuda.check(device_->cuda.cudaEventRecord(event_, stream), "cudaEventRecord");
}

void Event::order_before(cudaStream_t stream) const {
  const Device::Current current(*device_);
  device_->cuda.check(device_->cuda.cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

bool Event::passed() const {
  const Device::Current current(*device_);
  const cudaError_t result = device_->cuda.cudaEventQuery(event_);
  if (result == cudaErrorNotReady) {
    device_->cuda.cudaGetLastError();  // it is none
    return false;
  }
  device_->cuda.check(result, "cudaEventQuery");
  return true;
}

Call::Call(std::shared_ptr<const Device> device, StreamAddress stream)
    : device_(std::move(device)) {
  ready_.record(stream_at(stream));
}

void Call::order_before(StreamAddress stream) { done_.order_before(stream_at(stream)); }

}  // namespace pycomm::nccl
