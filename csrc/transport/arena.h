#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>

namespace pycomm {

/// One process's shared memory: a sparse memfd without a name, sealed against shrinking, so nothing
/// is left behind after kill -9 and no /dev/shm limit applies. Peers map it through its descriptor.
///
/// Pages cost memory once touched; freed blocks give theirs back to the kernel. The arena stays
/// mapped until its last block dies.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  /// Blocks are whole pages: a freed one is punched out of the file, so it costs nothing and the
  /// next owner finds zeros.
  static constexpr std::size_t kAlignment = 4096;

  /// A new arena of this process.
  /// @throws CommError  names the failing system call and what to do.
  static std::shared_ptr<Arena> create(std::size_t reserve_bytes);

  /// A peer's arena. Takes over `descriptor`; nothing may be allocated in it.
  /// @throws CommError  it is shorter than that, or could become shorter.
  static std::shared_ptr<Arena> map(int descriptor, std::size_t reserve_bytes);

  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* base() const { return base_; }
  std::size_t reserve_bytes() const { return reserve_bytes_; }
  int descriptor() const { return descriptor_; }

  bool contains(const void* address, std::size_t bytes) const;
  /// Whether there are `bytes` behind an offset, which a peer may have given.
  bool holds(std::uint64_t offset, std::uint64_t bytes) const {
    return bytes <= reserve_bytes_ && offset <= reserve_bytes_ - bytes;
  }
  std::size_t offset_of(const void* address) const {
    return static_cast<std::size_t>(static_cast<const std::byte*>(address) - base_);
  }

  /// Zeroed memory of this process's arena.
  /// @throws CommError  the reservation is exhausted.
  std::shared_ptr<class ArenaBlock> allocate(std::size_t bytes);

  /// Never free the live block that holds `address`, if one of this arena's does: a peer may write
  /// there at any time.
  void quarantine(const void* address);

  /// From now on freed blocks keep their content until the arena goes: peers may still read it.
  void keep_pages() { keeps_pages_ = true; }

  /// Bytes in live blocks.
  std::size_t allocated_bytes() const;

 private:
  friend class ArenaBlock;
  Arena(std::byte* base, std::size_t reserve_bytes, int descriptor);
  static constexpr std::size_t kNowhere = ~std::size_t{0};
  std::size_t reserve(std::size_t bytes);
  void release(std::size_t offset);

  std::byte* base_;
  std::size_t reserve_bytes_;
  int descriptor_;
  std::atomic<bool> keeps_pages_{false};
  mutable std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  // offset -> bytes, neighbours merged
  std::map<std::size_t, std::size_t> used_;
  std::set<std::size_t> quarantined_;  // offsets of blocks in used_
};

/// A piece of an arena, freed when the last owner lets go.
class ArenaBlock {
 public:
  ArenaBlock(std::shared_ptr<Arena> arena, std::size_t offset, std::size_t bytes)
      : arena_(std::move(arena)), offset_(offset), bytes_(bytes) {}
  ~ArenaBlock() { arena_->release(offset_); }
  ArenaBlock(const ArenaBlock&) = delete;
  ArenaBlock& operator=(const ArenaBlock&) = delete;

  /// Keep memory, and the arena it lies in, to the end of the process: after a failure a peer or
  /// the network may write to it at any time.
  static void quarantine(std::shared_ptr<ArenaBlock> block);

  std::byte* data() const { return arena_->base() + offset_; }
  std::size_t offset() const { return offset_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Arena> arena_;
  std::size_t offset_;
  std::size_t bytes_;
};

}  // namespace pycomm
