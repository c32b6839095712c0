#include "group/black_box.h"

#include <cstdio>
#include <exception>
#include <filesystem>
#include <utility>

#include "core/clock.h"

namespace pycomm {

BlackBox::BlackBox(std::string folder, int host, std::vector<std::shared_ptr<Arena>> arenas)
    : folder_(std::move(folder)), host_(host), arenas_(std::move(arenas)) {}

std::string BlackBox::hint() const {
  if (folder_.empty()) return "";
  return "\n  What every rank did last: python -m pycomm trace " + folder_;
}

Trace BlackBox::take(const std::string& reason) const {
  Trace trace;
  if (folder_.empty()) return trace;
  trace.now_ns = Clock::now_ns();
  trace.reason = reason;
  for (const auto& arena : arenas_) {
    trace.ranks.push_back(read_page(*reinterpret_cast<const ProcessPage*>(arena->base())));
  }
  return trace;
}

void BlackBox::save(const Trace& trace) {
  if (folder_.empty()) return;
  std::lock_guard lock(mutex_);
  try {
    std::filesystem::create_directories(folder_);
    write_trace(folder_ + "/host-" + std::to_string(host_) + ".trace", trace);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pycomm: cannot save what the ranks did last: %s\n", error.what());
  }
}

}  // namespace pycomm
