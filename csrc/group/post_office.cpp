#include "group/post_office.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"
#include "group/absence.h"
#include "group/backoff.h"
#include "group/group.h"
#include "group/process.h"

namespace pycomm {
namespace {

/// How often a small receive looks for its message before it waits like any other.
constexpr int kLooksAtOnce = 128;

/// What a leaving rank had sent before may still be on its way.
constexpr auto kGrace = std::chrono::seconds(1);

/// What two ranks' messages are called in the order of launches, where groups have their tags.
constexpr std::uint64_t kIsPair = std::uint64_t{1} << 63;
constexpr int kRankBits = 20;

constexpr const char* kAbandoned =
    "pycomm was shut down: a send or recv that had not ended by then was abandoned. Wait for every "
    "Work before shutdown(); call pycomm.init() to start over.";

const Arena& arena_of(const Process& process, int world_rank) {
  const int local = process.placement.local_rank_of[static_cast<std::size_t>(world_rank)];
  return *process.local_arenas[static_cast<std::size_t>(local)];
}

}  // namespace

void PostOffice::prepare_memory(std::byte* memory, int local_size) {
  const RingLayout layout(local_size);
  for (int peer = 0; peer < local_size; ++peer) {
    // Its atomics alone: the rest is written before it is read, and touching it would cost memory.
    auto* ring = reinterpret_cast<FrameRing*>(memory + layout.offset_of_ring_to(peer));
    new (&ring->pushed) std::atomic<std::uint64_t>(0);
    new (&ring->popped) std::atomic<std::uint64_t>(0);
    new (&ring->slots_popped) std::atomic<std::uint64_t>(0);
  }
}

PostOffice::PostOffice(Group& group) : group_(group) {
  const Process& process = *group.process_;
  const Window& window = group.window_;
  const RingLayout layout(window.local_size());
  const auto ring = [&](int from, int to) {
    return reinterpret_cast<FrameRing*>(window.mail(from) + layout.offset_of_ring_to(to));
  };
  std::vector<Link*> links;
  for (int peer = 0; peer < group.size(); ++peer) {
    const int world_rank = group.context_.world_rank(peer);
    if (peer == group.rank()) {
      links.push_back(&self_);
    } else if (is_remote(peer)) {
      if (!courier_) {
        courier_ = std::make_unique<Courier>(
            *process.channel, group.context_.tag + 1,
            [&group](std::size_t bytes) { return group.allocate(bytes); }, &ArenaBlock::quarantine);
      }
      links.push_back(&courier_->link_to(world_rank));
    } else {
      const int local = group.placement().local_rank_of[static_cast<std::size_t>(peer)];
      const Arena& arena = arena_of(process, world_rank);
      rings_.push_back(std::make_unique<RingLink>(
          ring(window.local_rank(), local), ring(local, window.local_rank()), layout.slot_bytes,
          *process.arena, arena, Process::page_of(arena).doorbell));
      links.push_back(rings_.back().get());
    }
  }
  exchange_ = std::make_unique<Exchange>(
      group.rank(), std::move(links), [this](int peer, nccl::HostMail& mail) {
        const auto low = static_cast<std::uint64_t>(std::min(peer, group_.rank()));
        const auto high = static_cast<std::uint64_t>(std::max(peer, group_.rank()));
        const std::uint64_t id = kIsPair |
                                 static_cast<std::uint64_t>(group_.context_.tag) << 2 * kRankBits |
                                 low << kRankBits | high;
        Process& process = *group_.process_;
        return process.gpu_plane().join({id, group_.rank(), peer, !is_remote(peer), mail,
                                         *process.arena, group_.context_.staging.gpu_slot_bytes});
      });
}

bool PostOffice::is_remote(int peer) const {
  const auto& host_of = group_.placement().host_of;
  return host_of[static_cast<std::size_t>(peer)] !=
         host_of[static_cast<std::size_t>(group_.rank())];
}

std::string PostOffice::describe(const Transfer& transfer) const {
  return transfer.describe() + ", on rank " + std::to_string(group_.rank());
}

void PostOffice::check_arguments(const Transfer& transfer) const {
  const bool sends = transfer.direction == Transfer::Direction::kSend;
  const auto where = [&] {
    return std::string(sends ? "send" : "recv") + " on rank " + std::to_string(group_.rank()) +
           ": ";
  };
  if (in_forked_child()) {
    throw CommError(where() +
                    "this process was forked from a rank and is not one itself. "
                    "Communicate in the parent, or start workers with the 'spawn' method and call "
                    "pycomm.init().");
  }
  const int lowest = sends ? 0 : Transfer::kAnySource;
  if (transfer.peer < lowest || transfer.peer >= group_.size()) {
    throw InvalidArgumentError(where() + (sends ? "dst" : "src") + " is " +
                               std::to_string(transfer.peer) + ", the group has ranks 0 to " +
                               std::to_string(group_.size() - 1) + ".");
  }
  if (transfer.tag < 0) {
    throw InvalidArgumentError(where() + "tag is " + std::to_string(transfer.tag) +
                               ", and tags are not negative.");
  }
}

bool PostOffice::can_be_driven_by_waiter(const Transfer& transfer) const {
  const bool any_source = transfer.peer == Transfer::kAnySource;
  return transfer.device < 0 && (!courier_ || (!any_source && !is_remote(transfer.peer)));
}

std::shared_ptr<PostOffice::Item> PostOffice::accept(const Transfer& transfer,
                                                     double timeout_s) const {
  auto item = std::make_shared<Item>();
  static_cast<Transfer&>(*item) = transfer;
  item->began = Clock::now();
  item->timeout_s = timeout_s > 0 ? timeout_s : group_.timeout_s_;
  if (transfer.device >= 0) {
    const bool sends = transfer.direction == Transfer::Direction::kSend;
    item->device_call = group_.process_->gpu_plane().record(sends ? "send" : "recv",
                                                            transfer.device, transfer.stream);
  }
  item->work = std::make_shared<TransferWork>(group_.process_->page().doorbell, item->device_call);
  item->work->driven_by_waiter = can_be_driven_by_waiter(transfer);
  item->entry = group_.journal_.queue(transfer);
  return item;
}

void PostOffice::check_usable() const {
  {
    std::lock_guard lock(group_.mutex_);
    if (group_.failure_) std::rethrow_exception(group_.failure_);
  }
  if (group_.process_->stopped()) {
    throw CommError("pycomm was shut down; call pycomm.init() again.");
  }
}

bool PostOffice::run_at_once(const Transfer& transfer) {
  if (transfer.device >= 0 || transfer.bytes() > Frame::kEagerBytes) return false;
  std::lock_guard lock(mutex_);
  check_usable();
  try {
    group_.check_notices();
    const bool over =
        transfer.direction == Transfer::Direction::kSend
            ? exchange_->send_at_once(transfer)
            : exchange_->receive_at_once(transfer, group_.process_->may_spin ? kLooksAtOnce : 1);
    if (over && exchange_->has_unsent()) submit();
    if (over) group_.journal_.end(group_.journal_.queue(transfer), /*failed=*/false);
    return over;
  } catch (...) {
    std::rethrow_exception(fail(first_unfinished()));
  }
}

void PostOffice::post(const std::shared_ptr<Item>& item) {
  check_usable();
  try {
    group_.check_notices();  // who comes late to a finished group must not get a result
    exchange_->advance();    // what has come already came before what is posted now
    exchange_->post(item);
  } catch (...) {
    std::rethrow_exception(fail(first_unfinished()));
  }
  drive();
}

bool PostOffice::drive() {
  if (failed_) return false;
  try {
    const bool moved = exchange_->advance();
    complete_done();
    // What concerns GPUs is for the progress thread, and this may be another one.
    if (exchange_->gpus().has_news()) group_.process_->page().doorbell.ring();
    return moved;
  } catch (...) {
    fail(first_unfinished());
    return true;
  }
}

bool PostOffice::drive_gpus() {
  try {
    const bool moved = exchange_->advance_gpus();
    complete_done();
    return moved;
  } catch (...) {
    if (!failed_) fail(first_unfinished());
    return true;
  }
}

void PostOffice::complete_done() {
  for (auto& transfer : exchange_->take_done()) done_.push_back(std::move(transfer));
  if (done_.empty()) return;
  const auto read_there = [](const auto& transfer) { return transfer->read_there; };
  if (std::any_of(done_.begin(), done_.end(), read_there) && !group_.window_.all_sound()) return;
  for (const auto& transfer : std::exchange(done_, {})) {
    auto& item = static_cast<Item&>(*transfer);
    complete(item, std::exchange(item.error, nullptr));
  }
}

void PostOffice::complete(Item& item, std::exception_ptr error) {
  item.work->source = item.peer;
  item.work->count = item.count;
  item.work->immediate = item.immediate;
  group_.journal_.end(item.entry, /*failed=*/error != nullptr);
  item.work->complete(std::move(error), item.seconds());
}

std::shared_ptr<TransferWork> PostOffice::start(const Transfer& transfer, double timeout_s) {
  check_arguments(transfer);
  auto item = accept(transfer, timeout_s);
  std::lock_guard lock(mutex_);
  post(item);
  const bool needs_driving = !item->work->done() && !exchange_->is_left_to_sender(*item);
  if (needs_driving || exchange_->has_unsent() || courier_) submit();
  return item->work;
}

int PostOffice::run(const Transfer& transfer, double timeout_s,
                    const InterruptCheck& check_interrupt,
                    const std::function<void()>& before_waiting) {
  check_arguments(transfer);
  const bool drives_itself = can_be_driven_by_waiter(transfer);
  if (drives_itself && transfer.peer != Transfer::kAnySource && run_at_once(transfer)) {
    return transfer.peer;
  }
  if (before_waiting) before_waiting();
  const auto item = accept(transfer, timeout_s);
  TransferWork& work = *item->work;
  {
    std::lock_guard lock(mutex_);
    post(item);
    if (!drives_itself) submit();
  }
  // A transfer must not outlive the caller's memory: what interrupts the wait ends the group.
  const auto checked = [&] {
    try {
      check_interrupt();
    } catch (...) {
      std::lock_guard lock(mutex_);
      fail(describe(*item));
      throw;
    }
  };
  if (drives_itself) drive_until_done(work, checked);
  work.wait(checked);
  if (work.device_call() != nullptr) work.device_call()->order_before(transfer.stream);
  return work.source;
}

void PostOffice::wait(TransferWork& work, const InterruptCheck& check_interrupt) {
  if (work.driven_by_waiter && !in_forked_child()) {
    work.await();
    drive_until_done(work, check_interrupt);
  }
  work.wait(check_interrupt);
}

void PostOffice::drive_until_done(const TransferWork& work, const std::function<void()>& check) {
  Backoff(group_.window_.doorbell(), group_.process_->may_spin)
      .drive([&] { return work.done(); },
             [&] {
               std::lock_guard lock(mutex_);
               return drive() || work.done();
             },
             [&] {
               {
                 std::lock_guard lock(mutex_);
                 check_peers_and_deadlines();
               }
               check();
             });
  std::lock_guard lock(mutex_);
  if (exchange_->has_unsent()) submit();
}

void PostOffice::submit() {
  if (engine_drives_) return;
  try {
    // Keeps the group alive, not this object alone.
    group_.process_->submit(std::shared_ptr<Progressive>(group_.shared_from_this(), this));
    engine_drives_ = true;
  } catch (...) {
    end_all(std::current_exception());
    throw;
  }
}

Progressive::State PostOffice::advance() {
  std::lock_guard lock(mutex_);
  bool moved = false;
  if (courier_) {
    try {
      moved = courier_->poll();
    } catch (...) {
      if (!failed_) fail(first_unfinished());
    }
  }
  moved |= drive();
  moved |= drive_gpus();
  if (moved) return State::kAdvanced;
  // After a failure a last frame may be on its way: it tells a peer on another host why.
  if (exchange_->idle() && done_.empty() && (!courier_ || courier_->idle())) {
    engine_drives_ = false;
    return State::kIdle;
  }
  return courier_ || exchange_->gpus().must_be_polled() ? State::kPolling : State::kWaiting;
}

void PostOffice::check() {
  std::lock_guard lock(mutex_);
  check_peers_and_deadlines();
}

void PostOffice::check_peers_and_deadlines() {
  if (failed_) return;
  if (group_.process_->stopped()) {  // by another thread than the one that waits here
    end_all(std::make_exception_ptr(CommError(kAbandoned)));
    return;
  }
  try {
    group_.check_notices();
    if (const int lost = group_.window_.lost_peer(); lost >= 0) {
      throw PeerLostError(first_unfinished() + ": rank " + std::to_string(lost) + kIsGone);
    }
    group_.check_other_hosts([&] { return first_unfinished(); });
    for (const auto& transfer : exchange_->unfinished()) check(static_cast<Item&>(*transfer));
  } catch (...) {
    fail(first_unfinished());
  }
}

bool PostOffice::nobody_left_for(const Item& item) const {
  const auto has_left = [&](int peer) {
    if (peer == group_.rank() || is_remote(peer)) return false;  // or cannot be seen from here
    const Arena& arena = arena_of(*group_.process_, group_.context_.world_rank(peer));
    return Process::page_of(arena).leaving.load(std::memory_order_acquire);
  };
  if (item.peer >= 0) return has_left(item.peer);
  for (int peer = 0; peer < group_.size(); ++peer) {
    if (peer != group_.rank() && !has_left(peer)) return false;
  }
  return group_.size() > 1;
}

void PostOffice::check(Item& item) {
  if (!nobody_left_for(item)) {
    item.left_since.reset();
  } else if (!item.left_since) {
    item.left_since = Clock::now();
  } else if (Clock::now() - *item.left_since > kGrace) {
    throw MismatchError(
        describe(item) + ": " +
        (item.peer < 0 ? "every other rank" : "rank " + std::to_string(item.peer)) +
        " called shutdown() instead.\n  Every send needs its recv, and every recv its send.");
  }
  if (item.in_slot && !item.awaited_since) {
    if (!item.work->awaited()) return;
    item.awaited_since = Clock::now();
  }
  const double seconds = seconds_since(item.awaited_since.value_or(item.began));
  if (seconds > item.timeout_s) {
    std::vector<int> missing;
    if (item.peer >= 0 && item.peer != group_.rank() && !is_remote(item.peer)) {
      if (!group_.window_.begin_inquiry() && seconds < item.timeout_s + kLongestInquiry) return;
      missing.push_back(group_.placement().local_rank_of[static_cast<std::size_t>(item.peer)]);
    }
    const bool sends = item.direction == Transfer::Direction::kSend;
    std::string awaited = exchange_->gpus().obstacle(item);
    if (awaited.empty()) {
      awaited = (item.peer < 0 ? "any rank" : "rank " + std::to_string(item.peer)) +
                (sends ? " to receive it" : " to send it");
    }
    throw CommTimeoutError(describe(item) + ": timeout after " + seconds_text(seconds) +
                           ", waiting for " + awaited + "." +
                           describe_missing(group_.window_, missing) + "\n  " + kTimeoutRemedy +
                           group_.process_->remark_on(group_.ranks_));
  }
}

std::string PostOffice::first_unfinished() const {
  const auto unfinished = exchange_->unfinished();
  if (!unfinished.empty()) return describe(*unfinished.front());
  const std::string launched = exchange_->gpus().describe_launched();
  return launched.empty() ? "send or recv" : launched;
}

std::exception_ptr PostOffice::fail(const std::string& call) {
  const std::exception_ptr error = group_.fail(call);
  std::exception_ptr lasting;
  {
    std::lock_guard lock(group_.mutex_);
    lasting = group_.failure_;
  }
  end_all(lasting);
  exchange_->give_up_gpus();
  if (exchange_->gpus().idle() || group_.process_->stopped()) return error;
  try {
    submit();
  } catch (const CommError&) {
    // Shut down meanwhile: the GPU is left with the group.
  }
  return error;
}

void PostOffice::end_all(const std::exception_ptr& error) {
  failed_ = true;
  for (auto& transfer : exchange_->take_done()) done_.push_back(std::move(transfer));
  for (const auto& transfer : std::exchange(done_, {})) {
    auto& item = static_cast<Item&>(*transfer);
    complete(item, item.read_there ? error : std::exchange(item.error, nullptr));
  }
  const auto unfinished = exchange_->unfinished();
  exchange_->clear();
  for (const auto& transfer : unfinished) {
    if (transfer->slot) group_.quarantine(transfer->slot);  // its sender may be writing there
    const auto& item = static_cast<const Item&>(*transfer);
    group_.journal_.end(item.entry, /*failed=*/true);
    item.work->complete(error, item.seconds());
  }
}

void PostOffice::abandon() {
  std::lock_guard lock(mutex_);
  if (!failed_) end_all(std::make_exception_ptr(CommError(kAbandoned)));
  exchange_->leave_gpus([this] { return group_.given_up_elsewhere(); });
}

}  // namespace pycomm
