#include "transport/whereabouts.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "core/clock.h"

namespace pycomm {
namespace {

constexpr auto kLongestAnswer = std::chrono::seconds(1);
constexpr auto kLook = std::chrono::milliseconds(10);
/// What has not grown for so long is the whole answer.
constexpr auto kQuiet = std::chrono::milliseconds(50);

std::string seconds_since(std::int64_t then_ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s",
                static_cast<double>(Clock::now_ns() - then_ns) * 1e-9);
  return text;
}

/// The letter after the name in /proc/PID/stat; the name may contain anything. 0: no such process.
char state_letter(int process) {
  std::ifstream file("/proc/" + std::to_string(process) + "/stat");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const std::size_t end = text.rfind(") ");
  return end == std::string::npos || end + 2 >= text.size() ? '\0' : text[end + 2];
}

const char* meaning(char state) {
  switch (state) {
    case '\0':
      return "ended";
    case 'R':
      return "running";
    case 'S':
    case 'I':
      return "sleeping";
    case 'D':
      return "waiting for a disk or a driver";
    case 'T':
      return "stopped by a signal";
    case 't':
      return "stopped by a debugger";
    case 'Z':
    case 'X':
      return "dead";
  }
  return "in an unknown state";
}

const char* state_of(const ProcessPage& page) {
  if (page.life.owner_died()) return "dead";
  if (!page.identity.shares_process_numbers()) return "in another container";
  return meaning(state_letter(page.identity.process));
}

std::string describe_call(const Record& record) {
  std::string text = record.describe();
  if (record.what == Record::What::kCollective && record.signature.sequence > 0) {
    text += " (call #" + std::to_string(record.signature.sequence) + " of " +
            record.describe_group() + ")";
  }
  return text + record.signature.place();
}

/// The last call, which others that have not ended may go before.
std::string describe_last(const Record& last, const std::optional<Record>& unfinished) {
  using State = Record::State;
  const std::string text = describe_call(last);
  switch (last.state) {
    case State::kQueued:
      return "has queued " + text + " " + seconds_since(last.queued_ns) + " ago";
    case State::kRunning:
      return "has been in " + text + " for " + seconds_since(last.started_ns);
    case State::kDone:
    case State::kFailed:
      break;
  }
  const std::string ended = "last did " + text + ", which " +
                            (last.state == State::kDone ? "ended " : "failed ") +
                            seconds_since(last.ended_ns) + " ago, and ";
  if (!unfinished) return ended + "is in no call of pycomm";
  return ended + "has been waiting for the end of " + describe_call(*unfinished) + " for " +
         seconds_since(unfinished->queued_ns);
}

/// What is at the end of a file, from `offset`.
std::string read_from(int descriptor, off_t offset) {
  std::string text;
  char part[4096];
  for (ssize_t bytes = 0; (bytes = pread(descriptor, part, sizeof(part), offset)) > 0;) {
    text.append(part, static_cast<std::size_t>(bytes));
    offset += bytes;
  }
  return text;
}

off_t length_of(int descriptor) {
  struct stat status{};
  return fstat(descriptor, &status) == 0 ? status.st_size : 0;
}

/// faulthandler ends each thread with an empty line and the main one comes last, if it is not the
/// one that got the signal ("Current thread").
std::string main_thread_first(const std::string& text) {
  std::vector<std::string> threads;
  for (std::size_t begin = 0; begin < text.size();) {
    std::size_t end = text.find("\n\n", begin);
    end = end == std::string::npos ? text.size() : end;
    threads.push_back(text.substr(begin, end - begin));
    begin = end + 2;
  }
  std::reverse(threads.begin(), threads.end());
  std::string ordered;
  for (const std::string& thread : threads) ordered += thread + "\n";
  return ordered;
}

std::string indented(const std::string& text, std::size_t most_bytes) {
  std::string lines;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = "\n    " + text.substr(begin, end - begin);
    if (lines.size() + line.size() > most_bytes) return lines + "\n    ...";
    if (end > begin) lines += line;
    begin = end + 1;
  }
  return lines;
}

/// Sends the signal to just this process, even if its number is given to another meanwhile. It has
/// to share this one's process numbers.
bool send_signal(const ProcessPage& page, int signal) {
  const int process = static_cast<int>(syscall(SYS_pidfd_open, page.identity.process, 0));
  if (process < 0) return false;
  const bool alive = !page.life.owner_died() && !page.leaving.load(std::memory_order_acquire);
  const bool sent = alive && syscall(SYS_pidfd_send_signal, process, signal, nullptr, 0) == 0;
  close(process);
  return sent;
}

std::string ask(const ProcessPage& page, int signal, int file) {
  const off_t before = length_of(file);
  if (!send_signal(page, signal)) return "";
  const auto deadline = Clock::now() + kLongestAnswer;
  off_t length = before;
  auto grown = Clock::now();
  while (Clock::now() < deadline) {
    std::this_thread::sleep_for(kLook);
    if (const off_t now = length_of(file); now != length) {
      length = now;
      grown = Clock::now();
    } else if (length > before && Clock::now() - grown > kQuiet) {
      break;
    }
  }
  return read_from(file, before);
}

}  // namespace

std::string describe_whereabouts(const ProcessPage& page, const std::string& name) {
  std::string text =
      name + " (process " + std::to_string(page.identity.process) + ", " + state_of(page) + ") ";
  if (page.leaving.load(std::memory_order_acquire)) return text + "has called shutdown()";
  const std::uint64_t latest = page.recorder.latest();
  if (latest == 0) return text + "has made no call of pycomm yet";
  const auto last = page.recorder.read(latest);
  if (!last) return text + "is just making a call";
  return text + describe_last(*last, page.recorder.first_unfinished());
}

int whom_it_waits_for(const ProcessPage& page) {
  const auto unfinished = page.recorder.first_unfinished();
  return unfinished ? unfinished->peer_in_world : -1;
}

std::string stacks_of(const ProcessPage& page, std::size_t most_bytes) {
  const std::string none = "\n    No stack: ";
  if (!page.identity.shares_process_numbers()) {
    return none + "the process runs in another container.";
  }
  const int process = page.identity.process;
  const int signal = page.stacks.signal.load(std::memory_order_acquire);
  if (signal == 0) return none + "the process offers none.";
  if (const char state = state_letter(process); state == 'T' || state == 't') {
    return none + "the process is stopped; `kill -CONT " + std::to_string(process) +
           "` lets it go on.";
  }
  const std::string path = "/proc/" + std::to_string(process) + "/fd/" +
                           std::to_string(page.stacks.descriptor.load(std::memory_order_relaxed));
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return none + path + ": " + std::strerror(errno) + ".";
  const std::string text = ask(page, signal, file);
  close(file);
  if (text.empty()) return none + "the process did not answer within a second.";
  return indented(main_thread_first(text), most_bytes);
}

}  // namespace pycomm
