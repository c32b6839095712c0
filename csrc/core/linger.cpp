#include "core/linger.h"

#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <filesystem>
#include <vector>

namespace pycomm {
namespace {

bool is_connection(int file) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  return getpeername(file, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
         (address.ss_family == AF_INET || address.ss_family == AF_INET6);
}

/// Such as the pipes that a launcher reads to their end.
std::vector<int> files_but_connections() {
  std::vector<int> files;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    const int file = std::atoi(entry.path().filename().c_str());
    if (!is_connection(file)) files.push_back(file);
  }
  return files;
}

}  // namespace

void linger(double seconds) noexcept {
  std::vector<int> closed;
  try {
    closed = files_but_connections();
  } catch (const std::exception&) {
    return;
  }
  timespec left{};
  left.tv_sec = static_cast<time_t>(seconds);
  left.tv_nsec = static_cast<long>((seconds - static_cast<double>(left.tv_sec)) * 1e9);
  // Not fork(): its handlers (Python's, torch's) take locks that other threads may hold. For the
  // same reason the copy only makes system calls.
  if (syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr) != 0) return;
  setsid();  // launchers end whole process groups, and this host's before the others'
  for (const int file : closed) close(file);
  nanosleep(&left, nullptr);
  _exit(0);
}

}  // namespace pycomm
