#include <utility>
#include <vector>

#include "group/process.h"
#include "transport/channel_loopback.h"

namespace pycomm {

std::vector<std::shared_ptr<Process>> Process::loopback(
    const std::vector<int>& hosts, Options options,
    std::vector<std::shared_ptr<Channel>> channels) {
  const int size = static_cast<int>(hosts.size());
  std::vector<std::string> keys;
  std::vector<std::shared_ptr<Arena>> arenas;
  std::vector<std::shared_ptr<ArenaBlock>> pages;
  for (const int host : hosts) {
    keys.push_back(std::to_string(host));
    arenas.push_back(Arena::create(options.arena_bytes));
    pages.push_back(make_process_page(*arenas.back()));
  }
  const Placement placement = Placement::of(keys);
  if (channels.empty()) {
    for (auto& channel : make_loopback_channels(size)) channels.push_back(std::move(channel));
  }
  std::vector<std::string> names;
  for (const auto& ranks : placement.hosts) {
    names.push_back(keys[static_cast<std::size_t>(ranks.front())]);
  }
  std::vector<std::shared_ptr<Process>> processes;
  for (int rank = 0; rank < size; ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    std::vector<std::shared_ptr<Arena>> locals;
    for (const int peer : placement.hosts[static_cast<std::size_t>(placement.host_of[at])]) {
      locals.push_back(arenas[static_cast<std::size_t>(peer)]);
    }
    processes.push_back(
        std::shared_ptr<Process>(new Process(rank, size, options, placement, names, pages[at],
                                             arenas[at], channels[at], std::move(locals))));
  }
  return processes;
}

}  // namespace pycomm
