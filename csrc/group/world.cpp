#include "group/world.h"

#include <cstring>
#include <numeric>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"

namespace pycomm {
namespace {

std::vector<int> all_ranks(int size) {
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

}  // namespace

std::unique_ptr<World> World::connect(int rank, int size, const std::string& host_key,
                                      const Process::AllGatherBytes& all_gather_bytes,
                                      std::shared_ptr<Channel> channel, Process::Options options) {
  auto process =
      Process::connect(rank, size, host_key, all_gather_bytes, std::move(channel), options);
  auto group = Group::create(process, all_ranks(size), [&](const GroupRecord& mine) {
    std::vector<GroupRecord> records;
    const std::string bytes(reinterpret_cast<const char*>(&mine), sizeof(mine));
    for (const std::string& theirs : all_gather_bytes(bytes)) {
      if (theirs.size() != sizeof(GroupRecord)) {
        throw CommError("init: a rank sent a malformed group record.");
      }
      std::memcpy(&records.emplace_back(), theirs.data(), sizeof(GroupRecord));
    }
    return records;
  });
  return std::unique_ptr<World>(new World(std::move(process), std::move(group)));
}

std::vector<std::unique_ptr<World>> World::loopback(
    const std::vector<int>& hosts, Process::Options options,
    std::vector<std::shared_ptr<Channel>> channels) {
  const auto processes = Process::loopback(hosts, options, std::move(channels));
  const auto ranks = all_ranks(static_cast<int>(hosts.size()));
  // Every arena is fresh and alike, so each rank's page lands at the same offset.
  std::vector<std::unique_ptr<World>> worlds;
  for (const auto& process : processes) {
    auto group = Group::create(process, ranks, [&](const GroupRecord& mine) {
      return std::vector<GroupRecord>(ranks.size(), mine);
    });
    worlds.push_back(std::unique_ptr<World>(new World(process, std::move(group))));
  }
  return worlds;
}

World::~World() {
  if (!in_forked_child()) leave();
}

bool World::abort(const std::string& reason) {
  aborted_ = true;
  const bool first = process_->job_notice().post(NoticeKind::kPeerLost, process_->rank, reason);
  group_->abort(reason);
  process_->ring_all();
  return first;
}

void World::close(const InterruptCheck& check_interrupt) {
  if (process_->stopped()) return;
  announce_leaving();
  try {
    if (!aborted_ && !group_->failed()) {
      group_->check_notices();
      Operation goodbye;
      goodbye.kind = Kind::kShutdown;
      group_->run(std::move(goodbye), check_interrupt);
    }
  } catch (...) {
    leave();
    throw;
  }
  leave();
}

void World::announce_leaving() {
  process_->page().leaving.store(true, std::memory_order_release);
  process_->ring_all();
}

void World::leave() {
  announce_leaving();
  process_->stop();
}

}  // namespace pycomm
