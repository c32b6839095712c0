#include "double/shared_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

namespace gpu_double {
namespace {

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::abort();
}

ino_t inode_of(int descriptor) {
  struct stat status{};
  if (fstat(descriptor, &status) != 0) die("gpu double: fstat");
  return status.st_ino;
}

}  // namespace

SharedFile::SharedFile(std::size_t bytes) : descriptor_(memfd_create("gpu double", MFD_CLOEXEC)) {
  if (descriptor_ < 0 || ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) {
    die("gpu double: memfd");
  }
}

std::optional<SharedFile> SharedFile::find(const Name& name) {
  const std::string path =
      "/proc/" + std::to_string(name.process) + "/fd/" + std::to_string(name.descriptor);
  const int descriptor = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return std::nullopt;
  SharedFile found(Open{descriptor});
  if (inode_of(descriptor) != name.inode) return std::nullopt;
  return found;
}

SharedFile::SharedFile(SharedFile&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)) {}

SharedFile::~SharedFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

SharedFile::Name SharedFile::name() const { return {getpid(), descriptor_, inode_of(descriptor_)}; }

std::byte* SharedFile::map(std::size_t offset, std::size_t bytes, int protection) const {
  void* const at =
      mmap(nullptr, bytes, protection, MAP_SHARED, descriptor_, static_cast<off_t>(offset));
  if (at == MAP_FAILED) die("gpu double: mmap");
  return static_cast<std::byte*>(at);
}

}  // namespace gpu_double
