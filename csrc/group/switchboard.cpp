#include "group/switchboard.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/rank_list.h"

namespace pycomm {
namespace {

/// Between two looks of a rank that is busy.
constexpr auto kShortestPause = std::chrono::milliseconds(20);
constexpr auto kLongestPeriod = std::chrono::seconds(1);
/// When the rank that speaks for a host is stopped, another does after kPeriodsToStall, and up to
/// two periods pass besides; a message may take one, and the others' look one more.
constexpr int kBeatsInTimeout = 8;
/// A progress thread that was not seen for so many periods is stopped, or gets no processor; for so
/// many it has itself been away, and cannot say how long others were silent.
constexpr int kPeriodsToStall = 3;
/// Of a host that was silent for so many periods all ranks are addressed: another may speak for it.
constexpr int kPeriodsToAskAll = 2;
/// The ranks of a job do not get as far as their first beat at the same time.
constexpr auto kStartUp = std::chrono::seconds(60);
constexpr auto kLongestLeave = std::chrono::milliseconds(50);
constexpr auto kBetweenFaultLooks = Roster::kBetweenLooks;
/// A group that is not known yet is being made, and of those there is one at a time; tags of groups
/// that are gone are forgotten, oldest first.
constexpr std::size_t kMostEarlyEnds = 64;
/// A pulse: this rank has left.
constexpr std::int64_t kHasLeft = -1;

std::int64_t nanoseconds(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

std::string in_seconds(Clock::duration duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", std::chrono::duration<double>(duration).count());
  return text;
}

std::string list_of(const std::vector<int>& ranks) {
  return (ranks.size() == 1 ? "rank " : "ranks ") + rank_list(ranks);
}

std::string text_of_stall(int rank) {
  return "\n  The process of rank " + std::to_string(rank) +
         " does not run, while its host does: it is stopped (SIGSTOP, a debugger), or starved.";
}

/// Of a message that is not over the network may still touch the memory: it is kept for ever.
void withdraw(std::unique_ptr<Message>& message, std::vector<std::byte>& bytes) {
  static std::mutex mutex;
  static auto& kept = *new std::vector<std::vector<std::byte>>();
  message.reset();
  std::lock_guard lock(mutex);
  kept.push_back(std::move(bytes));
}

}  // namespace

Switchboard::Switchboard(Setting setting, Channel& channel, Roster& roster, Notice& job_notice)
    : setting_(std::move(setting)),
      channel_(channel),
      roster_(roster),
      job_notice_(job_notice),
      my_host_(host_of(setting_.rank)),
      local_rank_(setting_.placement.local_rank_of[index(setting_.rank)]),
      timeout_(std::chrono::duration_cast<Clock::duration>(
          std::chrono::duration<double>(setting_.host_timeout_s))),
      period_(std::min<Clock::duration>(kLongestPeriod, timeout_ / kBeatsInTimeout)),
      began_(Clock::now()) {
  for (int host = 0; host < setting_.placement.host_count(); ++host) {
    hosts_.push_back({ranks_of(host).front(), Clock::now()});
  }
  last_attended_ = Clock::now();
  last_tick_ = last_attended_ - period_;  // the first beat goes at once
}

Switchboard::~Switchboard() {
  for (Letter& letter : on_their_way_) withdraw(letter.message, letter.bytes);
  for (Arriving& arriving : arriving_) withdraw(arriving.message, arriving.bytes);
}

std::string Switchboard::name_of(int host) const {
  return "host '" + setting_.host_names[index(host)] + "'";
}

// --- from any thread -----------------------------------------------------------------------------

void Switchboard::post(const std::vector<int>& to, const control::Body& body) {
  if (to.empty()) return;
  const auto bytes = control::encode(body);
  std::lock_guard lock(mutex_);
  for (const int rank : to) outbox_.push_back({rank, bytes});
  unsent_ += to.size();
  has_letters_.store(true, std::memory_order_release);
}

void Switchboard::tell_end(const Enrolled& group, int group_rank, NoticeKind kind,
                           const std::string& text) {
  control::End end;
  end.tag = group.tag();
  end.kind = kind;
  end.rank = group_rank;
  control::set_text(end.text, text);
  std::vector<int> to;
  for (const int rank : group.ranks()) {
    if (host_of(rank) != my_host_ && !is_lost(rank)) to.push_back(rank);
  }
  post(to, end);
}

void Switchboard::tell_end_of_job(const std::string& text) {
  control::End end;
  end.kind = NoticeKind::kPeerLost;
  end.rank = setting_.rank;
  control::set_text(end.text, text);
  std::vector<int> to;
  for (int rank = 0; rank < world_size(); ++rank) {
    if (host_of(rank) != my_host_ && !is_lost(rank)) to.push_back(rank);
  }
  post(to, end);
}

void Switchboard::await_sent(std::chrono::milliseconds at_most) {
  std::unique_lock lock(mutex_);
  sent_.wait_for(lock, at_most, [this] { return unsent_ == 0; });
}

void Switchboard::deliver_early(Enrolled& group) {
  std::lock_guard lock(mutex_);
  const auto early = early_ends_.find(group.tag());
  if (early == early_ends_.end()) return;
  group.end(early->second.kind, early->second.rank, early->second.text.data());
  early_ends_.erase(early);
}

std::string Switchboard::loss_among(const std::vector<int>& ranks) const {
  if (!has_lost_.load(std::memory_order_acquire)) return {};
  std::lock_guard lock(mutex_);
  for (const int rank : ranks) {
    if (const auto found = lost_.find(rank); found != lost_.end()) return found->second;
  }
  return {};
}

bool Switchboard::is_lost(int rank) const {
  std::lock_guard lock(mutex_);
  return lost_.contains(rank);
}

std::string Switchboard::remark_on(const std::vector<int>& ranks) const {
  std::string text;
  std::lock_guard lock(mutex_);
  for (const int rank : ranks) {
    if (host_of(rank) != my_host_) {
      const auto told = stalled_.find(rank);
      const bool is_news =
          told != stalled_.end() && Clock::now() - told->second <= kPeriodsToStall * period_;
      if (is_news) text += text_of_stall(rank);
    } else if (rank != setting_.rank && !runs(setting_.placement.local_rank_of[index(rank)])) {
      text += text_of_stall(rank);
    }
  }
  return text;
}

// --- the progress thread -------------------------------------------------------------------------

void Switchboard::attend() {
  const auto now = Clock::now();
  if (now - last_attended_ < kShortestPause && !has_letters_.load(std::memory_order_acquire)) {
    return;
  }
  if (now - last_attended_ > kPeriodsToStall * period_) {
    for (Host& host : hosts_) host.heard = now;
  }
  last_attended_ = now;
  setting_.pages[index(local_rank_)]->pulse_ns.store(nanoseconds(now), std::memory_order_release);
  receive();
  look_for_deaths();
  if (now - last_tick_ >= period_) {
    last_tick_ = now;
    beat();
    look_for_silence();
  }
  if (now - last_fault_look_ >= kBetweenFaultLooks) {
    last_fault_look_ = now;
    pass_on_standings();
    look_for_faults();
  }
  send();
}

void Switchboard::leave() {
  auto& pulse = setting_.pages[index(local_rank_)]->pulse_ns;
  const bool spoke = speaks();
  // Sequentially consistent, as the loads in runs(): of two that leave at once at least one sees
  // that the other does.
  pulse.store(kHasLeft);
  if (spoke || speaks()) {
    control::Leave body;
    for (int peer = static_cast<int>(setting_.pages.size()) - 1; peer >= 0; --peer) {
      if (peer != local_rank_ && runs(peer)) body.successor = ranks_of(my_host_)[index(peer)];
    }
    // Nobody is left to learn who speaks there, so all are told.
    post(body.successor == control::Leave::kNobody ? of_other_hosts() : speakers(), body);
  }
  const auto until = Clock::now() + kLongestLeave;
  for (send(); !on_their_way_.empty() && Clock::now() < until; send()) yield_core();
}

void Switchboard::send() {
  std::vector<Letter> letters;
  if (has_letters_.exchange(false, std::memory_order_acq_rel)) {
    std::lock_guard lock(mutex_);
    letters.swap(outbox_);
  }
  std::size_t over = 0;
  for (Letter& letter : letters) {
    const Fate fate = attempt(letter.to, [&] {
      letter.message = channel_.send(letter.to, Channel::kControlTag, letter.bytes);
      return false;
    });
    if (fate == Fate::kLost) {
      ++over;
    } else {
      on_their_way_.push_back(std::move(letter));
    }
  }
  for (auto letter = on_their_way_.begin(); letter != on_their_way_.end();) {
    const Fate fate = attempt(letter->to, [&] { return letter->message->poll(); });
    if (fate == Fate::kOnItsWay) {
      ++letter;
      continue;
    }
    if (fate == Fate::kLost) withdraw(letter->message, letter->bytes);
    letter = on_their_way_.erase(letter);
    ++over;
  }
  if (over == 0) return;
  {
    std::lock_guard lock(mutex_);
    unsent_ -= over;
  }
  sent_.notify_one();
}

Switchboard::Fate Switchboard::attempt(int peer, const std::function<bool()>& call) {
  try {
    return call() ? Fate::kOver : Fate::kOnItsWay;
  } catch (const PeerLostError& error) {
    if (!is_lost(peer)) declare_lost({peer}, error.what());
  } catch (const CommError&) {
    // MPI cannot reach it just now. If that lasts, its host's silence is what counts.
  }
  return Fate::kLost;
}

void Switchboard::receive() {
  const auto misunderstand = [this](const MismatchError& error) {
    misunderstood_ = true;
    job_notice_.post(NoticeKind::kMismatch, setting_.rank, error.what());
  };
  if (misunderstood_) return;
  std::vector<Arriving> arriving = std::exchange(arriving_, {});
  try {
    while (const auto coming = channel_.probe(Channel::kControlTag)) {
      if (coming->bytes > control::kMostBytes) control::refuse(coming->peer, coming->bytes);
      Arriving next{coming->peer};
      next.bytes.resize(coming->bytes);
      next.message = channel_.receive(next.from, Channel::kControlTag, next.bytes);
      // Takes the message, so that the next probe finds the next one.
      next.fate = attempt(next.from, [&] { return next.message->poll(); });
      arriving.push_back(std::move(next));
    }
  } catch (const MismatchError& error) {
    misunderstand(error);
  } catch (const CommError&) {
    // MPI cannot tell what has come. If that lasts, the silence is what counts.
  }
  std::set<int> behind;  // whose oldest message is still on its way
  for (Arriving& each : arriving) {
    const bool waits = misunderstood_ || behind.contains(each.from);
    if (!waits && each.fate == Fate::kOnItsWay) {
      each.fate = attempt(each.from, [&] { return each.message->poll(); });
    }
    if (waits || each.fate == Fate::kOnItsWay) {
      behind.insert(each.from);
      arriving_.push_back(std::move(each));
    } else if (each.fate == Fate::kLost) {
      withdraw(each.message, each.bytes);
    } else {
      try {
        handle(each.from, control::decode(each.bytes, each.from, world_size()));
      } catch (const MismatchError& error) {
        misunderstand(error);
      }
    }
  }
}

void Switchboard::handle(int from, const control::Body& body) {
  Host& host = hosts_[index(host_of(from))];
  host.heard = Clock::now();
  if (!std::exchange(host.heard_ever, true)) {
    const bool has_heard_all = std::all_of(hosts_.begin(), hosts_.end(), [this](const Host& other) {
      return &other == &hosts_[index(my_host_)] || other.heard_ever || other.is_over;
    });
    if (has_heard_all) {
      setting_.pages[index(local_rank_)]->has_heard_all.store(true, std::memory_order_relaxed);
    }
  }
  std::visit([&](const auto& plain) { handle(from, plain); }, body);
}

void Switchboard::handle(int from, const control::Beat& beat) {
  hosts_[index(host_of(from))].speaker = from;
  std::lock_guard lock(mutex_);
  for (const int rank : ranks_of(host_of(from))) stalled_.erase(rank);
  for (int i = 0; i < beat.stalled_count; ++i) stalled_[beat.stalled[index(i)]] = Clock::now();
}

void Switchboard::handle(int from, const control::Loss& loss) {
  std::vector<int> ranks(loss.ranks.begin(), loss.ranks.begin() + loss.rank_count);
  std::string text = loss.text.data();
  if (std::find(ranks.begin(), ranks.end(), setting_.rank) != ranks.end()) {
    // To them this rank is lost, so they are to it: no group that has both goes on.
    text = name_of(host_of(from)) + " takes rank " + std::to_string(setting_.rank) +
           " for lost: " + text;
    ranks = ranks_of(host_of(from));
  }
  note_lost(ranks, text);
}

void Switchboard::handle(int, const control::End& end) {
  if (end.tag == control::End::kJob) {
    if (job_notice_.post(end.kind, end.rank, end.text.data())) {
      for (ProcessPage* const page : setting_.pages) page->doorbell.ring();
    }
    return;
  }
  if (end.is_for_all != 0) return end_for_all(setting_.rank, end);
  {
    // Before the look, so that a group which enrols meanwhile finds it.
    std::lock_guard lock(mutex_);
    early_ends_.insert_or_assign(end.tag, end);
    if (early_ends_.size() > kMostEarlyEnds) early_ends_.erase(early_ends_.begin());
  }
  const bool known = roster_.with_group(
      end.tag, [&](Enrolled& group) { group.end(end.kind, end.rank, end.text.data()); });
  if (!known) return;
  std::lock_guard lock(mutex_);
  early_ends_.erase(end.tag);
}

void Switchboard::handle(int from, const Standing& standing) {
  if (host_of(standing.rank) == host_of(from)) shown_[standing.rank].standing = standing;
}

void Switchboard::handle(int from, const control::Leave& leave) {
  Host& host = hosts_[index(host_of(from))];
  if (leave.successor == control::Leave::kNobody) {
    host.is_over = true;
  } else if (host_of(leave.successor) == host_of(from)) {
    host.speaker = leave.successor;
  }
}

bool Switchboard::runs(int local_rank) const {
  const ProcessPage& page = *setting_.pages[index(local_rank)];
  if (page.life.owner_died()) return false;
  const std::int64_t pulse = page.pulse_ns.load();
  if (pulse == kHasLeft) return false;
  // One that has not begun counts from when this rank did.
  const std::int64_t last_seen = pulse == 0 ? nanoseconds(began_) : pulse;
  const std::chrono::nanoseconds age(nanoseconds(Clock::now()) - last_seen);
  return age <= kPeriodsToStall * period_;
}

bool Switchboard::speaks() const {
  for (int peer = 0; peer < local_rank_; ++peer) {
    if (runs(peer)) return false;
  }
  return true;
}

std::vector<int> Switchboard::others() const {
  std::vector<int> ranks;
  for (int rank = 0; rank < world_size(); ++rank) {
    if (rank == setting_.rank || is_lost(rank) || hosts_[index(host_of(rank))].is_over) continue;
    ranks.push_back(rank);
  }
  return ranks;
}

std::vector<int> Switchboard::of_other_hosts() const {
  std::vector<int> ranks = others();
  std::erase_if(ranks, [this](int rank) { return host_of(rank) == my_host_; });
  return ranks;
}

std::vector<int> Switchboard::speakers() const {
  const auto now = Clock::now();
  std::vector<int> ranks = of_other_hosts();
  std::erase_if(ranks, [&](int rank) {
    const Host& host = hosts_[index(host_of(rank))];
    return rank != host.speaker && now - host.heard < kPeriodsToAskAll * period_;
  });
  return ranks;
}

void Switchboard::look_for_deaths() {
  for (std::size_t peer = 0; peer < setting_.pages.size(); ++peer) {
    const int rank = ranks_of(my_host_)[peer];
    if (!setting_.pages[peer]->life.owner_died() || is_lost(rank) || !speaks()) continue;
    declare_lost({rank}, "rank " + std::to_string(rank) + " on " + name_of(my_host_) + kIsGone);
  }
}

void Switchboard::beat() {
  if (!speaks()) return;
  control::Beat beat;
  for (std::size_t peer = 0; peer < setting_.pages.size(); ++peer) {
    const ProcessPage& page = *setting_.pages[peer];
    if (beat.stalled_count == control::Beat::kMostStalled) break;
    if (page.life.owner_died() || page.pulse_ns.load() == kHasLeft) continue;
    if (runs(static_cast<int>(peer))) continue;
    beat.stalled[index(beat.stalled_count++)] = ranks_of(my_host_)[peer];
  }
  std::vector<int> to = beat.stalled_count > 0 ? of_other_hosts() : speakers();
  // One that takes nothing gets no more: what is on its way will serve as a beat.
  std::erase_if(to, [&](int rank) {
    return std::any_of(on_their_way_.begin(), on_their_way_.end(),
                       [&](const Letter& letter) { return letter.to == rank; });
  });
  post(to, beat);
}

void Switchboard::look_for_silence() {
  const auto now = Clock::now();
  const bool listens = speaks();
  // Who spoke before may have heard of a host of which this rank never has.
  const bool all_have_begun = std::any_of(
      setting_.pages.begin(), setting_.pages.end(),
      [](const ProcessPage* page) { return page->has_heard_all.load(std::memory_order_relaxed); });
  for (int other = 0; other < static_cast<int>(hosts_.size()); ++other) {
    Host& host = hosts_[index(other)];
    if (other == my_host_ || host.is_over) continue;
    if (!listens) host.heard = now;  // who speaks next begins to count
    const bool has_begun = host.heard_ever || all_have_begun;
    const Clock::duration silence = now - host.heard;
    if (silence <= (has_begun ? timeout_ : timeout_ + kStartUp)) continue;
    std::vector<int> ranks = ranks_of(other);
    std::erase_if(ranks, [this](int rank) { return is_lost(rank); });
    declare_lost(ranks, "no answer from " + name_of(other) + " (" + list_of(ranks_of(other)) +
                            ") to " + name_of(my_host_) + " for " + in_seconds(silence) +
                            ": it is down, frozen, or the network between is cut.\n  Look at that "
                            "host first. If it is only stopped at times (a virtual machine that "
                            "is moved, a debugger), raise PYCOMM_HOST_TIMEOUT_S.");
  }
}

void Switchboard::declare_lost(const std::vector<int>& ranks, const std::string& text) {
  note_lost(ranks, text);
  const auto to = others();
  for (std::size_t begin = 0; begin < ranks.size(); begin += control::Loss::kMostRanks) {
    control::Loss loss;
    const std::size_t end = std::min<std::size_t>(ranks.size(), begin + control::Loss::kMostRanks);
    for (std::size_t i = begin; i < end; ++i) loss.ranks[i - begin] = ranks[i];
    loss.rank_count = static_cast<std::int32_t>(end - begin);
    control::set_text(loss.text, text);
    post(to, loss);
  }
}

void Switchboard::note_lost(const std::vector<int>& ranks, const std::string& text) {
  {
    std::lock_guard lock(mutex_);
    for (const int rank : ranks) {
      lost_.try_emplace(rank, text);
      stalled_.erase(rank);
    }
    has_lost_.store(true, std::memory_order_release);
  }
  for (const int rank : ranks) {
    Host& host = hosts_[index(host_of(rank))];
    shown_.erase(rank);
    if (host.speaker != rank) continue;
    const auto& all = ranks_of(host_of(rank));
    const auto next =
        std::find_if(all.begin(), all.end(), [this](int other) { return !is_lost(other); });
    host.is_over = next == all.end();
    if (!host.is_over) host.speaker = *next;
  }
}

void Switchboard::pass_on_standings() {
  if (!speaks()) return;
  for (std::size_t peer = 0; peer < setting_.pages.size(); ++peer) {
    const StandingBoard& board = setting_.pages[peer]->standing;
    const int rank = ranks_of(my_host_)[peer];
    Shown& shown = shown_[rank];
    const std::uint64_t version = board.version();
    if (version == shown.version) continue;
    const auto standing = board.read();
    if (!standing || standing->rank != rank) continue;  // it changes: the next look finds it
    // What was told of it by who spoke before may have to be taken back.
    const bool matters =
        standing->call_count > 0 || shown.standing.call_count > 0 || shown.version == 0;
    shown = {version, *standing};
    if (matters) post(speakers(), *standing);
  }
}

void Switchboard::look_for_faults() {
  std::vector<Standing> standings;
  for (const auto& [rank, shown] : shown_) {
    if (shown.standing.call_count > 0 && !is_lost(rank)) standings.push_back(shown.standing);
  }
  const auto fault = find_fault(standings);
  if (fault && suspected_ == fault->text) {
    for (const Fault::Concerned& concerned : fault->concerned) {
      control::End end;
      end.tag = concerned.tag;
      end.kind = NoticeKind::kMismatch;
      end.is_for_all = 1;
      control::set_text(end.text, fault->text);
      end_for_all(concerned.rank, end);
    }
  }
  suspected_ = fault ? std::optional(fault->text) : std::nullopt;
}

void Switchboard::end_for_all(int rank, const control::End& end) {
  if (rank != setting_.rank) return post({rank}, end);
  roster_.with_group(end.tag, [&](Enrolled& group) {
    const std::string text = end.text.data();
    if (group.end(end.kind, end.rank, text)) tell_end(group, end.rank, end.kind, text);
  });
}

}  // namespace pycomm
