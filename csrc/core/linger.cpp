#include "core/linger.h"

#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <limits>
#include <vector>

namespace pycomm {
namespace {

constexpr long kCloseRange = 436;  // SYS_close_range, which older headers lack

bool is_connection(int file) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  return getpeername(file, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
         (address.ss_family == AF_INET || address.ss_family == AF_INET6);
}

std::vector<int> connections() {
  std::vector<int> files;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    const int file = std::atoi(entry.path().filename().c_str());
    if (is_connection(file)) files.push_back(file);
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

void linger(double seconds) {
  const std::vector<int> kept = connections();
  if (kept.empty()) return;
  timespec left{};
  left.tv_sec = static_cast<time_t>(seconds);
  left.tv_nsec = static_cast<long>((seconds - static_cast<double>(left.tv_sec)) * 1e9);
  // Not fork(): its handlers (Python's, torch's) take locks that other threads may hold. For the
  // same reason the copy only makes system calls.
  if (syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr) != 0) return;
  unsigned next = 0;  // the others, such as the pipes that a launcher reads to their end
  for (const int file : kept) {
    if (static_cast<unsigned>(file) > next) syscall(kCloseRange, next, file - 1, 0);
    next = static_cast<unsigned>(file) + 1;
  }
  syscall(kCloseRange, next, std::numeric_limits<unsigned>::max(), 0);
  nanosleep(&left, nullptr);
  _exit(0);
}

}  // namespace pycomm
