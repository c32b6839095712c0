#include "transport/liveness.h"

#include <sys/syscall.h>
#include <unistd.h>

#include "core/simulation.h"
#include "core/system_error.h"

namespace pycomm {

LifeKeeper::LifeKeeper(LifeWord& word) : word_(word) {
  if (Simulation::current() != nullptr) return;  // its threads are not the kernel's
  entry_.next = &head_.list;
  head_.list.next = &entry_;
  head_.futex_offset = reinterpret_cast<char*>(&word.word_) - reinterpret_cast<char*>(&entry_);
  head_.list_op_pending = nullptr;
  word.word_.store(static_cast<std::uint32_t>(syscall(SYS_gettid)), std::memory_order_release);
  syscall(SYS_get_robust_list, 0, &previous_, &previous_bytes_);
  if (syscall(SYS_set_robust_list, &head_, sizeof(head_)) != 0) {
    throw_system_error("set_robust_list", "The kernel must support robust futexes.");
  }
}

LifeKeeper::~LifeKeeper() {
  if (Simulation::current() != nullptr) return;
  syscall(SYS_set_robust_list, previous_, previous_bytes_);
  word_.word_.store(0, std::memory_order_release);
}

}  // namespace pycomm
