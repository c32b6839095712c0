#pragma once

#include <sys/types.h>

#include <cstddef>
#include <optional>

namespace gpu_double {

/// Memory that several processes of a host can map. It has no name in any folder: others find it
/// through the process that made it, as long as that one keeps it open, so a process that is killed
/// leaves nothing behind.
class SharedFile {
 public:
  /// What another process needs to find it. All zeros: none.
  struct Name {
    pid_t process;
    int descriptor;
    ino_t inode;  // descriptors and processes are numbered anew, these are not

    bool operator==(const Name&) const = default;
  };

  /// Of zeros. Aborts if there is no memory.
  explicit SharedFile(std::size_t bytes);
  /// None: whoever made it has closed it, or is gone.
  static std::optional<SharedFile> find(const Name& name);

  SharedFile(SharedFile&& other) noexcept;
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;
  ~SharedFile();

  /// For others, while this object lives.
  Name name() const;

  /// Maps `bytes` of it behind `offset`, for the process's life or until munmap().
  std::byte* map(std::size_t offset, std::size_t bytes, int protection) const;

 private:
  struct Open {
    int descriptor;
  };
  explicit SharedFile(Open open) : descriptor_(open.descriptor) {}

  int descriptor_;
};

}  // namespace gpu_double
