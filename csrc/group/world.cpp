#include "group/world.h"

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

/// How the `size` members of a group exchange their records.
auto through(const Process::AllGatherBytes& all_gather_bytes, int size) {
  return [&all_gather_bytes, size](const GroupRecord& mine) {
    std::vector<GroupRecord> records;
    const std::string bytes(reinterpret_cast<const char*>(&mine), sizeof(mine));
    for (const std::string& theirs : all_gather_bytes(bytes)) {
      records.push_back(GroupRecord::decode(theirs));
    }
    if (records.size() != static_cast<std::size_t>(size)) {
      throw CommError("init: " + std::to_string(records.size()) + " group records came of " +
                      std::to_string(size) + " ranks.");
    }
    return records;
  };
}

}  // namespace

std::unique_ptr<World> World::connect(int rank, int size, const std::string& host_key,
                                      const Process::AllGatherBytes& all_gather_bytes,
                                      std::shared_ptr<Channel> channel, Process::Options options,
                                      const InterruptCheck& check_interrupt) {
  auto process = Process::connect(rank, size, host_key, all_gather_bytes, std::move(channel),
                                  options, check_interrupt);
  auto group = Group::create(process, all_ranks(size), through(all_gather_bytes, size));
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

std::shared_ptr<Group> World::make_group(const std::vector<int>& ranks,
                                         const Process::AllGatherBytes& all_gather_bytes,
                                         double timeout_s) {
  std::vector<bool> member(static_cast<std::size_t>(process_->size));
  for (const int rank : ranks) {
    const bool known = rank >= 0 && rank < process_->size;
    if (!known || member[static_cast<std::size_t>(rank)]) {
      throw InvalidArgumentError("make_group on rank " + std::to_string(process_->rank) +
                                 ": rank " + std::to_string(rank) +
                                 (known ? " is there twice." : " is not one of the world's."));
    }
    member[static_cast<std::size_t>(rank)] = true;
  }
  if (!member[static_cast<std::size_t>(process_->rank)]) {
    throw InvalidArgumentError("make_group on rank " + std::to_string(process_->rank) +
                               ": this rank is not one of them.");
  }
  if (process_->stopped()) throw CommError("pycomm was shut down; call pycomm.init() again.");
  return Group::create(process_, ranks, through(all_gather_bytes, static_cast<int>(ranks.size())),
                       timeout_s);
}

void World::check_present(const std::vector<int>& ranks, const std::string& call) const {
  if (process_->job_notice().posted()) process_->job_notice().raise();
  const Placement& placement = process_->placement;
  const auto where = call + " on rank " + std::to_string(process_->rank) + ": rank ";
  for (const int rank : ranks) {
    const auto at = static_cast<std::size_t>(rank);
    if (at >= placement.host_of.size()) {
      throw InvalidArgumentError(where + std::to_string(rank) + " is not one of the world's.");
    }
    if (placement.host_of[at] != placement.host_of[static_cast<std::size_t>(process_->rank)]) {
      const std::string loss = process_->loss_among({rank});
      if (!loss.empty()) throw PeerLostError(where + std::to_string(rank) + " is lost: " + loss);
      continue;
    }
    const auto local = static_cast<std::size_t>(placement.local_rank_of[at]);
    const ProcessPage& page = Process::page_of(*process_->local_arenas[local]);
    if (page.life.owner_died()) {
      throw PeerLostError(where + std::to_string(rank) + kIsGone);
    }
    if (page.leaving.load(std::memory_order_acquire)) {
      throw MismatchError(where + std::to_string(rank) +
                          " leaves the job instead.\n  Every rank must make the same calls.");
    }
  }
}

void World::offer_stacks(int signal, int descriptor) {
  StackOffer& offer = process_->page().stacks;
  offer.descriptor.store(descriptor, std::memory_order_relaxed);
  offer.signal.store(signal, std::memory_order_release);
}

bool World::abort(const std::string& reason) {
  aborted_ = true;
  const bool first = process_->job_notice().post(NoticeKind::kPeerLost, process_->rank, reason);
  group_->abort(reason);
  process_->ring_all();
  if (first) process_->tell_end_of_job(reason);
  return first;
}

void World::close(const InterruptCheck& check_interrupt, double timeout_s,
                  const std::string& failure) {
  if (process_->stopped()) return;
  announce_leaving();
  try {
    if (!aborted_ && !withdrawn_ && !group_->failed()) {
      group_->check_notices();
      Operation goodbye;
      goodbye.kind = Kind::kShutdown;
      goodbye.name = failure;
      goodbye.timeout_s = timeout_s;
      group_->run(std::move(goodbye), check_interrupt);
    }
  } catch (...) {
    leave();
    throw;
  }
  leave();
}

std::exception_ptr World::failure() const {
  std::exception_ptr first;
  process_->roster()->for_each_group([&](const Enrolled& group) {
    if (!first) first = group.failure();
  });
  return first;
}

std::vector<int> World::lost() const {
  std::vector<int> ranks;
  const Placement& placement = process_->placement;
  const int here = placement.host_of[static_cast<std::size_t>(process_->rank)];
  for (int rank = 0; rank < process_->size; ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    if (placement.host_of[at] != here) {
      if (!process_->loss_among({rank}).empty()) ranks.push_back(rank);
      continue;
    }
    const auto local = static_cast<std::size_t>(placement.local_rank_of[at]);
    const ProcessPage& page = Process::page_of(*process_->local_arenas[local]);
    if (page.life.owner_died() && !page.leaving.load(std::memory_order_acquire)) {
      ranks.push_back(rank);
    }
  }
  return ranks;
}

void World::withdraw() {
  withdrawn_ = true;
  announce_leaving();
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
