// Linked into every C++ test: upon SIGQUIT, which ctest sends to a test that hangs, and upon
// SIGABRT, which assert() raises, the test prints the stack of each of its threads (the ranks) and
// ends.
//
// The process is broken already, and a thread may hold any lock: nothing here allocates memory once
// the handlers are installed. addr2line names the frames; without it their addresses remain.

#include <dirent.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kMaxFrames = 48;
constexpr int kPrintStack = SIGUSR2;

int tasks_directory = -1;
std::uintptr_t load_address = 0;
std::atomic<int> stacks_printed{0};

/// Replaces the calling process by one that prints `addresses` of this program by name.
void exec_addr2line(char (*addresses)[24], int count) {
  char executable[32];
  std::snprintf(executable, sizeof executable, "/proc/%d/exe", static_cast<int>(getppid()));
  std::array<const char*, 4 + kMaxFrames + 1> argv{"addr2line", "-Cfpse", executable};
  for (int i = 0; i < count; ++i) argv[3 + i] = addresses[i];
  dup2(STDERR_FILENO, STDOUT_FILENO);
  execvp(argv[0], const_cast<char**>(argv.data()));
  _exit(127);
}

void print_stack_of_this_thread(int) {
  void* frames[kMaxFrames];
  const int count = backtrace(frames, kMaxFrames);
  char heading[32];
  const int length = std::snprintf(heading, sizeof heading, "\nthread %ld:\n", syscall(SYS_gettid));
  [[maybe_unused]] const auto written = write(STDERR_FILENO, heading, length);
  char addresses[kMaxFrames][24];
  for (int i = 0; i < count; ++i) {
    // A return address lies behind its call; frames of other libraries come out as "??".
    const auto address = reinterpret_cast<std::uintptr_t>(frames[i]) - load_address - 1;
    std::snprintf(addresses[i], sizeof addresses[i], "%#zx", static_cast<std::size_t>(address));
  }
  const pid_t child = static_cast<pid_t>(syscall(SYS_fork));  // without atfork handlers
  if (child == 0) exec_addr2line(addresses, count);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
    backtrace_symbols_fd(frames, count, STDERR_FILENO);
  }
  stacks_printed.fetch_add(1);
}

/// Has `thread` print its stack; gives it two seconds, as its stack may be beyond use.
void print_stack_of(pid_t thread) {
  const int before = stacks_printed.load();
  if (syscall(SYS_tgkill, getpid(), thread, kPrintStack) != 0) return;
  for (int i = 0; i < 200 && stacks_printed.load() == before; ++i) usleep(10'000);
}

void print_all_stacks_and_abort(int) {
  const auto self = static_cast<pid_t>(syscall(SYS_gettid));
  print_stack_of_this_thread(0);
  alignas(struct dirent64) char entries[4096];
  long size = 0;
  while ((size = syscall(SYS_getdents64, tasks_directory, entries, sizeof entries)) > 0) {
    for (long at = 0; at < size;) {
      const auto* entry = reinterpret_cast<const struct dirent64*>(entries + at);
      const int thread = std::atoi(entry->d_name);
      if (thread > 0 && thread != self) print_stack_of(thread);
      at += entry->d_reclen;
    }
  }
  signal(SIGABRT, SIG_DFL);
  raise(SIGABRT);
}

int remember_load_address(struct dl_phdr_info* program, std::size_t, void*) {
  load_address = program->dlpi_addr;  // the first one listed is the program itself
  return 1;
}

[[maybe_unused]] const bool handlers_installed = [] {
  void* frame = nullptr;
  backtrace(&frame, 1);  // its first call loads a library
  dl_iterate_phdr(remember_load_address, nullptr);
  tasks_directory = open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  signal(kPrintStack, print_stack_of_this_thread);
  signal(SIGABRT, print_all_stacks_and_abort);
  signal(SIGQUIT, print_all_stacks_and_abort);
  return true;
}();

}  // namespace
