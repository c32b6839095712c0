#include "double/memory.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <ctime>

namespace gpu_double {
namespace {

// The file: a page for the bell, then the memory.
constexpr std::size_t kBellBytes = 4096;
constexpr std::size_t kMemoryBytes = std::size_t{64} << 20;
constexpr std::size_t kAlignment = 512;

static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

}  // namespace

void Bell::ring() {
  ++rings;
  if (sleepers > 0) syscall(SYS_futex, &rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool Bell::wait(std::uint32_t heard, std::optional<std::chrono::steady_clock::time_point> until) {
  using std::chrono::nanoseconds;
  timespec left{};
  if (until) {
    const auto span = nanoseconds(*until - std::chrono::steady_clock::now()).count();
    if (span <= 0) return false;
    left = {span / 1'000'000'000, span % 1'000'000'000};
  }
  ++sleepers;
  syscall(SYS_futex, &rings, FUTEX_WAIT, heard, until ? &left : nullptr, nullptr, 0);
  --sleepers;
  return rings != heard || !until || std::chrono::steady_clock::now() < *until;
}

MappedMemory::MappedMemory(const SharedFile& file)
    : begin_(file.map(0, kBellBytes + kMemoryBytes, PROT_READ | PROT_WRITE)) {}

MappedMemory::~MappedMemory() { munmap(begin_, kBellBytes + kMemoryBytes); }

std::byte* MappedMemory::at(std::size_t offset) const { return begin_ + kBellBytes + offset; }

Bell& MappedMemory::bell() const { return *reinterpret_cast<Bell*>(begin_); }

Memory::Memory()
    : file_(kBellBytes + kMemoryBytes),
      mapped_(std::make_shared<MappedMemory>(file_)),
      host_(file_.map(kBellBytes, kMemoryBytes, PROT_NONE)) {}

void* Memory::allocate(std::size_t bytes) {
  bytes = (std::max<std::size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  std::size_t place = 0;
  for (const auto& [offset, length] : blocks_) {
    if (offset - place >= bytes) break;
    place = offset + length;
  }
  if (place + bytes > kMemoryBytes) return nullptr;
  blocks_[place] = bytes;
  std::memset(mapped_->at(place), 0xEE, bytes);  // nobody may count on zeros
  return host_ + place;
}

bool Memory::free(const void* address) {
  const auto offset = offset_of(address);
  const auto block = offset ? blocks_.find(*offset) : blocks_.end();
  if (block == blocks_.end()) return false;
  std::memset(mapped_->at(block->first), 0xDD, block->second);
  blocks_.erase(block);
  return true;
}

std::optional<std::size_t> Memory::offset_of(const void* address) const {
  const auto* const at = static_cast<const std::byte*>(address);
  if (at < host_ || at >= host_ + kMemoryBytes) return std::nullopt;
  return static_cast<std::size_t>(at - host_);
}

std::byte* Memory::reachable(const void* address) const {
  const auto offset = offset_of(address);
  return offset ? mapped_->at(*offset) : static_cast<std::byte*>(const_cast<void*>(address));
}

}  // namespace gpu_double
