#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>

#include "double/shared_file.h"

namespace gpu_double {

/// What the thread that moves a process's streams sleeps by; other processes ring it too.
struct Bell {
  std::atomic<std::uint32_t> rings;
  std::atomic<std::uint32_t> sleepers;

  void ring();
  /// Sleep unless it has rung since `rings` was `heard`.
  /// @return  false: it was `until` before it rang.
  bool wait(std::uint32_t heard, std::optional<std::chrono::steady_clock::time_point> until);
};

/// The "device" memory of a process as steps reach it, in that process or in another.
class MappedMemory {
 public:
  explicit MappedMemory(const SharedFile& file);
  ~MappedMemory();
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  std::byte* at(std::size_t offset) const;
  /// The streams of the process that it belongs to.
  Bell& bell() const;

 private:
  std::byte* const begin_;
};

/// The "device" memory of this process, mapped twice: where the host must not reach, and where
/// steps do.
class Memory {
 public:
  Memory();

  /// Null: there is no more.
  void* allocate(std::size_t bytes);
  bool free(const void* address);

  /// Where it lies in the memory; none: it does not.
  std::optional<std::size_t> offset_of(const void* address) const;
  /// Where steps find it; host memory is where it is.
  std::byte* reachable(const void* address) const;

  std::size_t blocks() const { return blocks_.size(); }
  SharedFile::Name name() const { return file_.name(); }
  const std::shared_ptr<MappedMemory>& mapped() const { return mapped_; }

 private:
  const SharedFile file_;
  const std::shared_ptr<MappedMemory> mapped_;
  std::byte* const host_;
  std::map<std::size_t, std::size_t> blocks_;  // bytes, by offset
};

}  // namespace gpu_double
