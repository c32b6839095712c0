#include "group/black_box.h"

#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <future>
#include <system_error>
#include <utility>

#include "core/clock.h"
#include "core/thread.h"

namespace pycomm {
namespace {

constexpr std::chrono::seconds kPatience{1};

void say(const std::exception& error) {
  std::fprintf(stderr, "pycomm: cannot save what the ranks did last: %s\n", error.what());
}

}  // namespace

BlackBox::BlackBox(const std::string& folder, int host, std::vector<std::shared_ptr<Arena>> arenas)
    : shelf_(new Shelf{folder, folder + "/host-" + std::to_string(host) + ".trace", {}}),
      arenas_(std::move(arenas)) {}

std::string BlackBox::hint() const {
  if (shelf_->folder.empty()) return "";
  return "\n  What every rank did last: python -m pycomm trace " + shelf_->folder;
}

Trace BlackBox::take(const std::string& reason) const {
  Trace trace;
  if (shelf_->folder.empty()) return trace;
  trace.now_ns = Clock::now_ns();
  trace.reason = reason;
  for (const auto& arena : arenas_) {
    trace.ranks.push_back(read_page(*reinterpret_cast<const ProcessPage*>(arena->base())));
  }
  return trace;
}

void BlackBox::save(Trace trace) {
  if (shelf_->folder.empty()) return;
  const auto saved = std::make_shared<std::promise<void>>();
  const std::future<void> done = saved->get_future();
  try {
    Thread([shelf = shelf_, trace = std::move(trace), saved] {
      shelf->put(trace);
      saved->set_value();
    }).detach();
  } catch (const std::system_error& error) {
    return say(error);
  }
  done.wait_for(kPatience);
}

void BlackBox::Shelf::put(const Trace& trace) {
  std::lock_guard lock(mutex);
  try {
    std::filesystem::create_directories(folder);
    write_trace(path, trace);
  } catch (const std::exception& error) {
    say(error);
  }
}

}  // namespace pycomm
