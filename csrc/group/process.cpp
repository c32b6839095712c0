#include "group/process.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <utility>

#include "core/error.h"
#include "core/simulation.h"
#include "group/introduction.h"
#include "transport/handover.h"

namespace pycomm {
namespace {

/// To tell other hosts why a rank leaves.
constexpr auto kLongestFarewell = std::chrono::milliseconds(200);

/// Whether `ranks` processes can all run at once. Bound ranks (one core each) count their cores
/// together.
bool enough_cores(int ranks) {
  if (Simulation::current() != nullptr) return false;  // one thread plays all of them
  cpu_set_t mine;
  const int bound_to = sched_getaffinity(0, sizeof(mine), &mine) == 0 ? CPU_COUNT(&mine) : ranks;
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  return ranks <= std::min<long>(online, static_cast<long>(ranks) * bound_to);
}

/// The host's name at the end of a key ("boot-id namespace name", "PYCOMM_HOST=name"), for errors.
std::string name_in(const std::string& host_key) {
  constexpr std::string_view kGiven = "PYCOMM_HOST=";
  return host_key.substr(host_key.starts_with(kGiven) ? kGiven.size()
                                                      : host_key.find_last_of(' ') + 1);
}

/// By host.
std::vector<std::string> names_of(const Placement& placement,
                                  const std::vector<std::string>& host_keys) {
  std::vector<std::string> names;
  for (const auto& ranks : placement.hosts) {
    names.push_back(name_in(host_keys[static_cast<std::size_t>(ranks.front())]));
  }
  return names;
}

}  // namespace

std::shared_ptr<ArenaBlock> make_process_page(Arena& arena) {
  auto block = arena.allocate(sizeof(ProcessPage));
  new (block->data()) ProcessPage;
  return block;
}

std::shared_ptr<Process> Process::connect(int rank, int size, const std::string& host_key,
                                          const AllGatherBytes& all_gather_bytes,
                                          std::shared_ptr<Channel> channel, Options options,
                                          const InterruptCheck& check_interrupt) {
  auto arena = Arena::create(options.arena_bytes);
  auto page = make_process_page(*arena);
  Handover handover;
  const Introduction mine{handover.address(), arena->reserve_bytes(),
                          random_hex(Handover::kTokenLength / 2), host_key};
  std::vector<Introduction> all;
  std::vector<std::string> keys;
  for (const std::string& text : all_gather_bytes(mine.encode())) {
    all.push_back(Introduction::decode(text, static_cast<int>(all.size())));
    keys.push_back(all.back().host_key);
  }
  if (static_cast<int>(all.size()) != size) {
    throw CommError("init: all_gather_bytes returned " + std::to_string(all.size()) +
                    " introductions in a world of " + std::to_string(size) + " ranks.");
  }
  Placement placement = Placement::of(keys);
  if (placement.host_count() > 1 && channel == nullptr) {
    throw CommError("init: the ranks run on " + std::to_string(placement.host_count()) +
                    " hosts, which exchange data over MPI, and there is no MPI channel.");
  }

  const auto me = static_cast<std::size_t>(rank);
  const auto& locals = placement.hosts[static_cast<std::size_t>(placement.host_of[me])];
  std::vector<std::string> addresses;
  for (const int peer : locals) addresses.push_back(all[static_cast<std::size_t>(peer)].address);
  auto descriptors = handover.exchange(
      placement.local_rank_of[me], addresses, locals, all.front().token, arena->descriptor(),
      std::chrono::nanoseconds(static_cast<std::int64_t>(std::min(options.timeout_s, 9e9) * 1e9)),
      check_interrupt);
  std::vector<std::shared_ptr<Arena>> local_arenas;
  for (std::size_t i = 0; i < locals.size(); ++i) {
    const std::size_t bytes = all[static_cast<std::size_t>(locals[i])].arena_bytes;
    local_arenas.push_back(descriptors[i].get() < 0 ? arena
                                                    : Arena::map(descriptors[i].release(), bytes));
  }
  auto names = names_of(placement, keys);
  if (channel != nullptr) {
    std::vector<std::string> by_rank;
    for (const int host : placement.host_of) {
      by_rank.push_back(names[static_cast<std::size_t>(host)]);
    }
    channel->name_hosts(std::move(by_rank));
  }
  return std::shared_ptr<Process>(new Process(rank, size, options, std::move(placement),
                                              std::move(names), std::move(page), std::move(arena),
                                              std::move(channel), std::move(local_arenas)));
}

Process::Process(int rank_in, int size_in, Options options_in, Placement placement_in,
                 std::vector<std::string> host_names, std::shared_ptr<ArenaBlock> page_block,
                 std::shared_ptr<Arena> arena_in, std::shared_ptr<Channel> channel_in,
                 std::vector<std::shared_ptr<Arena>> local_arenas_in)
    : rank(rank_in),
      size(size_in),
      options(std::move(options_in)),
      placement(std::move(placement_in)),
      arena(std::move(arena_in)),
      channel(std::move(channel_in)),
      local_arenas(std::move(local_arenas_in)),
      may_spin(enough_cores(static_cast<int>(local_arenas.size()))),
      page_block_(std::move(page_block)),
      black_box_(options.trace_folder, placement.host_of[static_cast<std::size_t>(rank)],
                 local_arenas),
      roster_(std::make_shared<Roster>(
          rank,
          placement
              .hosts[static_cast<std::size_t>(placement.host_of[static_cast<std::size_t>(rank)])],
          local_pages())),
      switchboard_(placement.host_count() == 1 || options.host_timeout_s <= 0
                       ? nullptr
                       : std::make_unique<Switchboard>(
                             Switchboard::Setting{rank, placement, std::move(host_names),
                                                  local_pages(), options.host_timeout_s},
                             *channel, *roster_, job_notice())),
      engine_(std::make_shared<Engine>(page(), channel.get(), switchboard_.get())) {
  page().identity =
      Identity::of_this_process(rank, size, placement.host_of[static_cast<std::size_t>(rank)],
                                options.host_name, options.job);
  page().magic.store(Identity::kMagic, std::memory_order_release);
}

std::vector<ProcessPage*> Process::local_pages() const {
  std::vector<ProcessPage*> pages;
  for (const auto& local : local_arenas) pages.push_back(&page_of(*local));
  return pages;
}

void Process::enrol(Enrolled& group) {
  roster_->enrol(group);
  if (switchboard_ != nullptr) switchboard_->deliver_early(group);
}

void Process::wake() {
  std::lock_guard lock(mutex_);
  if (engine_ != nullptr) engine_->wake();
}

void Process::tell_end(const Enrolled& group, int group_rank, NoticeKind kind,
                       const std::string& text) {
  if (switchboard_ == nullptr) return;
  switchboard_->tell_end(group, group_rank, kind, text);
  wake();
}

void Process::tell_end_of_job(const std::string& text) {
  if (switchboard_ == nullptr || stopped()) return;
  switchboard_->tell_end_of_job(text);
  wake();
  switchboard_->await_sent(kLongestFarewell);
}

std::string Process::loss_among(const std::vector<int>& ranks) const {
  return switchboard_ == nullptr ? std::string() : switchboard_->loss_among(ranks);
}

std::string Process::remark_on(const std::vector<int>& ranks) const {
  return switchboard_ == nullptr ? std::string() : switchboard_->remark_on(ranks);
}

void Process::submit(std::shared_ptr<Progressive> queue) {
  std::lock_guard lock(mutex_);
  if (engine_ == nullptr) throw CommError("pycomm was shut down; call pycomm.init() again.");
  engine_->submit(std::move(queue));
}

void Process::stop() {
  std::shared_ptr<Engine> engine;
  {
    std::lock_guard lock(mutex_);
    engine.swap(engine_);
    stopped_.store(true, std::memory_order_release);
  }
  // The thread is joined here, outside the lock that it may want.
}

std::shared_ptr<ArenaBlock> Process::allocate(std::size_t bytes) {
  free_retired();
  return arena->allocate(bytes);
}

nccl::Plane& Process::gpu_plane() {
  std::lock_guard lock(mutex_);
  if (gpu_plane_ == nullptr) {
    gpu_plane_ = nccl::make_plane(options.gpu_places, options.gpu_transport, options.mpi_problem);
  }
  return *gpu_plane_;
}

void Process::retire(std::shared_ptr<ArenaBlock> memory, std::function<bool()> all_left) {
  {
    std::lock_guard lock(mutex_);
    retired_.push_back({std::move(memory), std::move(all_left)});
  }
  free_retired();
}

void Process::free_retired() {
  std::lock_guard lock(mutex_);
  std::erase_if(retired_, [](const Retired& group) { return group.all_left(); });
}

std::unique_lock<std::mutex> Process::begin_group() {
  std::unique_lock making(making_group_, std::try_to_lock);
  if (!making) {
    throw CommError("rank " + std::to_string(rank) +
                    " makes two groups at once, in two threads. Make one after the other, in the "
                    "same order on all ranks.");
  }
  return making;
}

void Process::ring_all() const {
  for (const auto& local : local_arenas) page_of(*local).doorbell.ring();
}

}  // namespace pycomm
