#include "transport/process_page.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace pycomm {
namespace {

template <std::size_t kSize>
void write_text(std::array<char, kSize>& field, std::string_view text) {
  field.fill('\0');
  std::copy_n(text.begin(), std::min(text.size(), kSize - 1), field.begin());
}

std::uint64_t own_process_namespace() {
  struct stat about{};
  return stat("/proc/self/ns/pid", &about) == 0 ? about.st_ino : 0;
}

}  // namespace

bool Identity::shares_process_numbers() const {
  return process_namespace == own_process_namespace();
}

Identity Identity::of_this_process(int rank, int size, int host, std::string_view host_name,
                                   std::string_view job) {
  using std::chrono::nanoseconds;
  const auto since = [](auto now) {
    return std::chrono::duration_cast<nanoseconds>(now.time_since_epoch()).count();
  };
  Identity identity;
  identity.rank = rank;
  identity.size = size;
  identity.host = host;
  identity.process = static_cast<std::int32_t>(getpid());
  identity.process_namespace = own_process_namespace();
  identity.to_time_of_day_ns =
      since(std::chrono::system_clock::now()) - since(std::chrono::steady_clock::now());
  write_text(identity.host_name, host_name);
  write_text(identity.job, job);
  return identity;
}

}  // namespace pycomm
