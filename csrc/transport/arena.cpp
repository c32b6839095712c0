#include "transport/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "core/fork_guard.h"
#include "core/system_error.h"

namespace pycomm {
namespace {

std::byte* map_shared(int descriptor, std::size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, descriptor,
                    /*offset=*/0);
  if (base == MAP_FAILED) {
    throw_system_error("mmap of " + std::to_string(bytes) + " bytes of address space",
                       "Raise the address space limit (ulimit -v unlimited), or reserve less with "
                       "PYCOMM_ARENA_BYTES.");
  }
  return static_cast<std::byte*>(base);
}

}  // namespace

std::shared_ptr<Arena> Arena::create(std::size_t reserve_bytes) {
  watch_forks();
  reserve_bytes = (reserve_bytes + kAlignment - 1) / kAlignment * kAlignment;
  const int descriptor = memfd_create("pycomm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) {
    throw_system_error("memfd_create", "pycomm needs Linux 3.17 or newer and a free descriptor.");
  }
  try {
    if (ftruncate(descriptor, static_cast<off_t>(reserve_bytes)) != 0) {
      throw_system_error("ftruncate to " + std::to_string(reserve_bytes) + " bytes",
                         "Raise the file size limit (ulimit -f unlimited).");
    }
    // It has no name, but /proc shows it; memfd_create made it for everybody.
    if (fchmod(descriptor, S_IRUSR | S_IWUSR) != 0) {
      throw_system_error("fchmod", "The kernel refuses to make shared memory private.");
    }
    // A peer that could shrink the file would turn every later access into SIGBUS.
    if (fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
      throw_system_error("fcntl(F_ADD_SEALS)", "The kernel refuses to seal shared memory.");
    }
    std::byte* base = map_shared(descriptor, reserve_bytes);
    return std::shared_ptr<Arena>(new Arena(base, reserve_bytes, descriptor));
  } catch (...) {
    close(descriptor);
    throw;
  }
}

std::shared_ptr<Arena> Arena::map(int descriptor, std::size_t reserve_bytes) {
  try {
    // Access behind its end, now or once it has shrunk, is a SIGBUS.
    struct stat file;
    if (fstat(descriptor, &file) != 0 || static_cast<std::size_t>(file.st_size) < reserve_bytes ||
        (fcntl(descriptor, F_GET_SEALS) & F_SEAL_SHRINK) == 0) {
      throw CommError(
          "init: a rank of this host handed over something else than its memory.\n"
          "  All ranks must run the same version of pycomm.");
    }
    std::byte* base = map_shared(descriptor, reserve_bytes);
    auto arena = std::shared_ptr<Arena>(new Arena(base, reserve_bytes, descriptor));
    arena->free_.clear();
    return arena;
  } catch (...) {
    close(descriptor);
    throw;
  }
}

Arena::Arena(std::byte* base, std::size_t reserve_bytes, int descriptor)
    : base_(base), reserve_bytes_(reserve_bytes), descriptor_(descriptor) {
  free_[0] = reserve_bytes;
}

Arena::~Arena() {
  munmap(base_, reserve_bytes_);
  close(descriptor_);
}

bool Arena::contains(const void* address, std::size_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(address);
  return begin >= base_ && begin + bytes <= base_ + reserve_bytes_;
}

std::shared_ptr<ArenaBlock> Arena::allocate(std::size_t bytes) {
  const std::size_t needed =
      std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (in_forked_child()) {
    throw CommError("this process was forked from a rank: the shared memory is its parent's.");
  }
  if (const std::size_t offset = reserve(needed); offset != kNowhere) {
    return std::make_shared<ArenaBlock>(shared_from_this(), offset, bytes);
  }
  throw CommError("the shared memory arena has no " + std::to_string(bytes) +
                  " bytes in one piece left of its " + std::to_string(reserve_bytes_) +
                  ". Set PYCOMM_ARENA_BYTES to more than all gradients of this rank need.");
}

std::size_t Arena::reserve(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, available] = *it;
    if (available < bytes) continue;
    free_.erase(it);
    if (available > bytes) free_[offset + bytes] = available - bytes;
    used_[offset] = bytes;
    return offset;
  }
  return kNowhere;
}

void Arena::release(std::size_t offset) {
  if (in_forked_child()) return;  // the memory is the parent's
  std::lock_guard lock(mutex_);
  if (quarantined_.contains(offset)) return;
  const auto entry = used_.find(offset);
  std::size_t bytes = entry->second;
  used_.erase(entry);
  if (!keeps_pages_) madvise(base_ + offset, bytes, MADV_REMOVE);
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  free_[offset] = bytes;
}

void Arena::quarantine(const void* address) {
  if (!contains(address, 1)) return;
  std::lock_guard lock(mutex_);
  const std::size_t offset = offset_of(address);
  auto block = used_.upper_bound(offset);
  if (block == used_.begin()) return;
  --block;
  if (offset < block->first + block->second) quarantined_.insert(block->first);
}

void ArenaBlock::quarantine(std::shared_ptr<ArenaBlock> block) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<std::shared_ptr<ArenaBlock>>();  // never destroyed
  std::lock_guard lock(mutex);
  kept->push_back(std::move(block));
}

std::size_t Arena::allocated_bytes() const {
  std::lock_guard lock(mutex_);
  std::size_t total = 0;
  for (const auto& [offset, bytes] : used_) total += bytes;
  return total;
}

}  // namespace pycomm
