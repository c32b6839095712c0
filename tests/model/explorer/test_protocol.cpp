// The headers of the shared-memory protocol under schedules and weak memory: see explorer.h and
// docs/shm-protocol.md. With EXPLORE=n every scenario runs n times as many executions.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "explorer.h"
#include "point_to_point/ring_link.h"
#include "transport/window.h"

namespace {

using explore::Plan;
using explore::Scenario;
using explore::Setup;
using pycomm::Announcement;
using pycomm::Doorbell;
using pycomm::Notice;
using pycomm::NoticeKind;
using pycomm::Window;

constexpr auto kSleep = std::chrono::milliseconds(50);
constexpr int kMostRanks = 3;

/// The shared memory of a host's ranks, and one group's view of it for each.
struct Host {
  struct Memory {
    pycomm::ProcessPage processes[kMostRanks];
    pycomm::GroupPage pages[kMostRanks];
    Notice job;
  };

  // Without parentheses, which would write zeros to the flight recorders, too.
  Host(Setup& setup, int ranks) : ranks_(ranks), memory(*new (place()) Memory) {
    setup.share(&memory, sizeof(memory));
    for (int rank = 0; rank < ranks; ++rank) {
      std::fill(row(rank), row(rank) + kMostRanks, 0);
      setup.share(row(rank), kMostRanks * sizeof(std::int64_t));
    }
    for (int rank = 0; rank < ranks; ++rank) {
      std::vector<Window::Peer> peers;
      for (int peer = 0; peer < ranks; ++peer) {
        peers.push_back({&memory.processes[peer], &arena(peer), &memory.pages[peer], nullptr,
                         nullptr, nullptr, peer});
      }
      windows.emplace_back(rank, peers, 0, memory.job);
    }
  }

  static const pycomm::Arena& arena(int rank) {
    static const std::array arenas = {pycomm::Arena::create(4096), pycomm::Arena::create(4096),
                                      pycomm::Arena::create(4096)};
    static_assert(arenas.size() == kMostRanks);
    return *arenas[static_cast<std::size_t>(rank)];
  }
  /// A number for each rank, in the arena of one.
  static std::int64_t* row(int rank) { return reinterpret_cast<std::int64_t*>(arena(rank).base()); }
  int ranks() const { return ranks_; }

 private:
  static void* place() {
    alignas(Memory) static std::byte bytes[sizeof(Memory)];
    return bytes;
  }
  const int ranks_;

 public:
  Memory& memory;
  std::vector<Window> windows;
};

/// As in group/backoff.h: a look, and a sleep at the doorbell if there still is nothing.
template <typename Poll, typename Check>
void wait(Doorbell& doorbell, const Poll& poll, const Check& check) {
  struct Listener {
    explicit Listener(Doorbell& bell) : doorbell(bell), ticket(bell.listen()) {}
    ~Listener() { doorbell.leave(); }
    Doorbell& doorbell;
    const std::uint32_t ticket;
  };
  while (!poll()) {
    {
      const Listener listener(doorbell);
      if (poll()) return;
      doorbell.sleep(listener.ticket, kSleep);
    }
    check();
  }
}

const auto kNoCheck = [] {};

template <typename Waiting, typename Check>
void wait(Window& window, Waiting waiting, const Check& check) {
  wait(window.doorbell(), [&] { return waiting.poll(); }, check);
}

pycomm::Operation sum_of(std::size_t count) {
  pycomm::Operation operation;
  operation.kind = pycomm::Kind::kAllReduce;
  operation.dtype = pycomm::DType::kInt64;
  operation.count = count;
  return operation;
}

std::int64_t value_of(int rank, std::uint64_t sequence) {
  return static_cast<std::int64_t>(sequence) * 100 + rank;
}

std::int64_t sum_of_values(int ranks, std::uint64_t sequence) {
  std::int64_t sum = 0;
  for (int rank = 0; rank < ranks; ++rank) sum += value_of(rank, sequence);
  return sum;
}

/// Payloads of both kinds: in the line of the announcement, and beside it.
template <typename Check>
void reduce_shown(Window& window, std::uint64_t sequence, std::uint64_t& history,
                  const Check& check) {
  std::array<std::int64_t, 7> input{};
  input.fill(value_of(window.local_rank(), sequence));
  const std::size_t bytes = sequence % 2 == 0 ? sizeof(input) : sizeof(std::int64_t);
  window.check_notices();
  history = window.announce(sum_of(bytes / sizeof(std::int64_t)), sequence, history,
                            Announcement::kNotInArena,
                            reinterpret_cast<const std::byte*>(input.data()), bytes);
  wait(window, Window::AllAnnounced(window, sequence, /*compare=*/true), check);
  std::int64_t sum = 0;
  for (int peer = 0; peer < window.local_size(); ++peer) {
    const auto* payload =
        reinterpret_cast<const std::int64_t*>(window.announced_payload(peer, sequence, bytes));
    sum += payload[bytes / sizeof(std::int64_t) - 1];
  }
  explore::require(sum == sum_of_values(window.local_size(), sequence), "a wrong sum");
}

/// A small all-reduce, several times: fold_shown().
Scenario shown(int ranks, std::uint64_t operations) {
  return [=](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      setup.threads.push_back([=] {
        std::uint64_t history = 0;
        for (std::uint64_t sequence = 1; sequence <= operations; ++sequence) {
          reduce_shown(host->windows[static_cast<std::size_t>(rank)], sequence, history, kNoCheck);
        }
      });
    }
  };
}

/// An all-reduce where the buffers lie, several times: fold_in_place().
Scenario in_place(int ranks, std::uint64_t operations) {
  return [=](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      setup.threads.push_back([=] {
        Window& window = host->windows[static_cast<std::size_t>(rank)];
        std::int64_t* const mine = Host::row(rank);
        std::uint64_t history = 0;
        for (std::uint64_t sequence = 1; sequence <= operations; ++sequence) {
          std::fill(mine, mine + ranks, value_of(rank, sequence));
          history = window.announce(sum_of(static_cast<std::size_t>(ranks)), sequence, history, 0);
          wait(window, Window::AllAnnounced(window, sequence, /*compare=*/true), kNoCheck);
          std::int64_t sum = 0;
          const auto part_of = [&](int peer) -> std::int64_t& {
            return reinterpret_cast<std::int64_t*>(window.announced_buffer(
                peer, sequence, static_cast<std::size_t>(ranks) * sizeof(std::int64_t)))[rank];
          };
          for (int peer = 0; peer < ranks; ++peer) sum += part_of(peer);
          for (int peer = 0; peer < ranks; ++peer) part_of(peer) = sum;
          window.complete_phase();
          wait(window, Window::AllCompleted(window), kNoCheck);
          for (int part = 0; part < ranks; ++part) {
            explore::require(mine[part] == sum_of_values(ranks, sequence), "a wrong sum");
          }
        }
      });
    }
  };
}

/// The last rank's second call differs: all hear of it, and nothing was written.
Scenario mismatch(int ranks) {
  return [=](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, ranks);
    const auto raised = std::make_shared<int>(0);
    for (int rank = 0; rank < ranks; ++rank) {
      setup.threads.push_back([=] {
        Window& window = host->windows[static_cast<std::size_t>(rank)];
        std::uint64_t history = 0;
        try {
          for (std::uint64_t sequence = 1; sequence <= 2; ++sequence) {
            const bool differs = sequence == 2 && rank == ranks - 1;
            window.check_notices();
            history = window.announce(sum_of(differs ? 5 : 4), sequence, history, 0);
            wait(window, Window::AllAnnounced(window, sequence, /*compare=*/true),
                 [&] { window.check_notices(); });
          }
          explore::violation("a mismatch went unnoticed");
        } catch (const pycomm::MismatchError& error) {
          window.notice().post(NoticeKind::kMismatch, rank, error.what());
          window.ring_all();
          explore::require(std::strstr(error.what(), "rank ") != nullptr,
                           "a mismatch without ranks");
          ++*raised;
        }
      });
    }
    setup.sleeps_end = true;  // who sleeps looks at notices only when it has been woken
    setup.after = [=] { explore::require(*raised == ranks, "a mismatch not raised on all ranks"); };
  };
}

/// One rank changes a condition and rings, another sleeps until it holds; and back.
Scenario doorbell(int turns, explore::Membarrier membarrier = explore::Membarrier::kReachesAll) {
  return [=](Setup& setup) {
    explore::set_membarrier(membarrier);
    struct Memory {
      Doorbell doorbells[2];
      std::atomic<int> turn{0};
    };
    alignas(Memory) static std::byte place[sizeof(Memory)];
    auto* const memory = new (place) Memory();
    setup.share(place, sizeof(place));
    for (int me = 0; me < 2; ++me) {
      setup.threads.push_back([=] {
        for (int turn = me; turn < turns; turn += 2) {
          wait(
              memory->doorbells[me],
              [&] { return memory->turn.load(std::memory_order_relaxed) >= turn; }, kNoCheck);
          memory->turn.store(turn + 1, std::memory_order_relaxed);
          memory->doorbells[1 - me].ring();
        }
      });
    }
  };
}

/// The same, where the ringers' process could not register but the sleepers' could: the doorbells
/// are another process's, whose constructor does not run in this one.
Scenario doorbell_of_registered(int turns) {
  return [=](Setup& setup) {
    struct Memory {
      std::byte doorbells[2][sizeof(Doorbell)];
      std::atomic<int> turn;
    };
    alignas(Doorbell) static std::byte place[sizeof(Memory)];
    std::memset(place, 0, sizeof(place));
    explore::set_membarrier(explore::Membarrier::kReachesNobody);
    auto* const memory = reinterpret_cast<Memory*>(place);
    setup.share(place, sizeof(place));
    const auto bell = [=](int rank) -> Doorbell& {
      return reinterpret_cast<Doorbell&>(memory->doorbells[rank]);
    };
    for (int me = 0; me < 2; ++me) {
      setup.threads.push_back([=] {
        for (int turn = me; turn < turns; turn += 2) {
          wait(
              bell(me), [&] { return memory->turn.load(std::memory_order_relaxed) >= turn; },
              kNoCheck);
          memory->turn.store(turn + 1, std::memory_order_relaxed);
          bell(1 - me).ring();
        }
      });
    }
  };
}

/// Two ranks post, a third reads: whole, and of one of them.
Scenario notices() {
  return [](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, 3);
    const auto first = std::make_shared<int>(0);
    for (int rank = 0; rank < 2; ++rank) {
      setup.threads.push_back([=] {
        const std::string text = "rank " + std::to_string(rank) + " is lost";
        *first += host->memory.job.post(NoticeKind::kPeerLost, rank, text);
      });
    }
    setup.threads.push_back([=] {
      const Notice& notice = host->memory.job;
      while (!notice.posted()) explore::pause();
      std::string text;
      try {
        notice.raise();
      } catch (const pycomm::PeerLostError& error) {
        text = error.what();
      }
      const std::string expected = "rank " + std::to_string(notice.rank()) + " is lost";
      explore::require(text == expected, "a notice that nobody wrote");
    });
    setup.after = [=] { explore::require(*first == 1, "not one rank was first to post"); };
  };
}

/// Ranks fail after they have completed their part, and their callers change the buffers; another
/// rank reads those. It gets what was there before, or an error.
Scenario failed_reader(int failing) {
  return [=](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, failing + 1);
    constexpr std::int64_t kBefore = 1;
    // Only whether the reader takes what it read for sound counts: the race itself is intended.
    alignas(64) static std::atomic<std::int64_t> buffers[kMostRanks];
    for (auto& buffer : buffers) buffer.store(kBefore);
    setup.share(buffers, sizeof(buffers));
    for (int rank = 0; rank < failing; ++rank) {
      setup.threads.push_back([=] {
        Window& window = host->windows[static_cast<std::size_t>(rank)];
        window.complete_phase();
        window.notice().post(NoticeKind::kTimeout, rank, "a timeout");
        window.ring_all();
        buffers[rank].store(2, std::memory_order_relaxed);
      });
    }
    setup.threads.push_back([=] {
      Window& window = host->windows[static_cast<std::size_t>(failing)];
      bool sound = true;
      for (int rank = 0; rank < failing; ++rank) {
        sound &= buffers[rank].load(std::memory_order_relaxed) == kBefore;
      }
      window.complete_phase();
      try {
        wait(window, Window::AllCompleted(window), kNoCheck);
        explore::require(sound, "a wrong result without an error");
      } catch (const pycomm::CommTimeoutError&) {
        // as it should be
      }
    });
  };
}

/// More frames than the ring holds: small ones, or two of three in slots.
Scenario messages(int frames, bool in_slots) {
  return [=](Setup& setup) {
    constexpr std::size_t kSlotBytes = 16;
    struct Memory {
      Doorbell doorbells[2];
      struct Ring {
        pycomm::FrameRing ring;
        std::byte slots[pycomm::FrameRing::kSlots * kSlotBytes];
      } rings[2];
    };
    alignas(Memory) static std::byte place[sizeof(Memory)];
    auto* const memory = new (place) Memory();
    setup.share(place, sizeof(place));
    static const auto arena = pycomm::Arena::create(4096);
    using pycomm::Frame;
    for (int me = 0; me < 2; ++me) {
      setup.threads.push_back([=] {
        pycomm::RingLink link(&memory->rings[me].ring, &memory->rings[1 - me].ring, kSlotBytes,
                              *arena, *arena, memory->doorbells[1 - me]);
        for (std::int64_t number = 0; number < frames; ++number) {
          const bool in_slot = in_slots && number % 3 != 0;
          const auto kind = in_slot ? Frame::Kind::kData : Frame::Kind::kMessage;
          if (me == 0) {
            Frame frame;
            frame.kind = kind;
            frame.id = static_cast<std::uint64_t>(number);
            wait(
                memory->doorbells[me],
                [&] { return link.push(frame, std::as_bytes(std::span(&number, 1))); }, kNoCheck);
            continue;
          }
          wait(memory->doorbells[me], [&] { return link.front() != nullptr; }, kNoCheck);
          explore::require(link.front()->id == static_cast<std::uint64_t>(number),
                           "a frame out of order");
          std::int64_t payload = -1;
          std::memcpy(&payload, link.payload(), sizeof(payload));
          explore::require(payload == number, "another frame's payload");
          link.pop();
        }
      });
    }
  };
}

/// Every rank leaves the group after its last look at the others' pages, and reuses its own when
/// all have left.
Scenario leaving(int ranks) {
  return [=](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      setup.threads.push_back([=] {
        Window& window = host->windows[static_cast<std::size_t>(rank)];
        std::uint64_t history = 0;
        reduce_shown(window, 1, history, kNoCheck);
        window.leave();
        while (!window.all_left()) explore::pause();
        Announcement& mine = host->memory.pages[rank].announcements[1];
        mine.signature.sequence = 0;
        mine.hash = 0;
        mine.inline_payload.fill(std::byte{0});
      });
    }
  };
}

/// A rank calls shutdown() after it has announced its last operation: the others do not take it for
/// one that never came.
Scenario left_after_announcing() {
  return [](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, 2);
    setup.threads.push_back([=] {
      host->windows[0].announce(sum_of(1), 1, 0, Announcement::kNotInArena);
      host->memory.processes[0].leaving.store(true, std::memory_order_release);
    });
    setup.threads.push_back([=] {
      explore::require(host->windows[1].left_peer(1) < 0, "taken for one that left before");
    });
  };
}

/// The last rank dies somewhere: every other ends with right results or an error.
Scenario death(int ranks, std::uint64_t operations) {
  return [=](Setup& setup) {
    const auto host = std::make_shared<Host>(setup, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      setup.life_words.push_back(&host->memory.processes[rank].life);
      setup.threads.push_back([=] {
        Window& window = host->windows[static_cast<std::size_t>(rank)];
        const auto check_peers = [&] {
          window.check_notices();
          if (window.lost_peer() >= 0) throw pycomm::PeerLostError("a rank is lost");
        };
        std::uint64_t history = 0;
        try {
          for (std::uint64_t sequence = 1; sequence <= operations; ++sequence) {
            reduce_shown(window, sequence, history, check_peers);
          }
        } catch (const pycomm::PeerLostError& error) {
          window.notice().post(NoticeKind::kPeerLost, rank, error.what());
          window.ring_all();
        }
      });
    }
    setup.mortal = static_cast<std::size_t>(ranks - 1);
  };
}

struct Named {
  const char* name;
  Scenario scenario;
  std::uint64_t executions;  // random ones, where nothing is weakened
};

std::vector<Named> scenarios() {
  return {
      {"doorbell", doorbell(4), 6000},
      {"doorbell, no membarrier", doorbell(4, explore::Membarrier::kRefused), 3000},
      {"notices", notices(), 6000},
      {"shown, 2 ranks", shown(2, 4), 2000},
      {"shown, 3 ranks", shown(3, 3), 1000},
      {"in place, 2 ranks", in_place(2, 3), 2000},
      {"in place, 3 ranks", in_place(3, 2), 1000},
      {"mismatch, 2 ranks", mismatch(2), 1500},
      {"mismatch, 3 ranks", mismatch(3), 800},
      {"a failed rank's buffer", failed_reader(1), 6000},
      {"two failed ranks' buffers", failed_reader(2), 4000},
      {"messages, small", messages(20, false), 600},
      {"messages, in slots", messages(10, true), 600},
      {"left after announcing", left_after_announcing(), 1000},
      {"leaving, 2 ranks", leaving(2), 2000},
      {"leaving, 3 ranks", leaving(3), 1000},
      {"death, 2 ranks", death(2, 2), 3000},
      {"death, 3 ranks", death(3, 2), 1500},
  };
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::uint64_t effort() {
  const char* const text = std::getenv("EXPLORE");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

void expect_no_violation(const char* name, const explore::Result& result) {
  std::printf("      %-28s %8llu executions, %9llu steps%s\n", name,
              static_cast<unsigned long long>(result.executions),
              static_cast<unsigned long long>(result.steps),
              result.complete ? ", all of them" : "");
  if (result.violation.empty()) return;
  throw check::Failure(std::string(name) + ": " + result.violation + " (seed " +
                       std::to_string(result.seed) + ")");
}

}  // namespace

// First: once a process could register, its ringers never fence again.
TEST(ringers_that_could_not_register_fence) {
  const Scenario scenario = doorbell_of_registered(4);
  expect_no_violation("doorbell of registered",
                      explore::run(scenario, {.executions = 3000 * effort()}));
  for (const explore::Site& site : explore::sites()) {
    const std::string text = site.describe();
    if (text.find("doorbell.h") == std::string::npos) continue;
    const auto result = explore::run(scenario, {.executions = 3000, .weakened = site.address});
    std::printf("      %s\n        %s\n", text.c_str(), result.violation.c_str());
    CHECK(contains(result.violation, "sleeps for ever"));
    return;
  }
  check::fail(__FILE__, __LINE__, "no ringer has fenced");
}

TEST(random_schedules_find_nothing) {
  for (const Named& named : scenarios()) {
    expect_no_violation(named.name,
                        explore::run(named.scenario, {.executions = named.executions * effort()}));
  }
}

TEST(all_schedules_with_few_preemptions_find_nothing) {
  const bool thorough = effort() > 1;
  const std::uint64_t most = thorough ? 3000000 : 20000;
  for (const auto& [name, scenario] :
       {std::pair{"doorbell", doorbell(2)}, std::pair{"notices", notices()},
        std::pair{"a failed rank's buffer", failed_reader(1)},
        std::pair{"shown, 2 ranks", shown(2, 1)}, std::pair{"leaving, 2 ranks", leaving(2)}}) {
    expect_no_violation(
        name, explore::run(scenario, {.executions = most, .preemptions = thorough ? 2 : 1}));
  }
}

TEST(a_rank_may_die_before_any_of_its_steps) {
  for (const int ranks : {2, 3}) {
    const Scenario scenario = death(ranks, 2);
    constexpr int kNever = 1 << 20;
    int steps = explore::run(scenario, {.executions = 100, .dies_at = kNever}).mortal_steps + 1;
    for (int dies_at = 0; dies_at < steps; ++dies_at) {
      const auto result =
          explore::run(scenario, {.seed = 1000, .executions = 60 * effort(), .dies_at = dies_at});
      steps = std::max(steps, result.mortal_steps + 1);
      if (!result.violation.empty()) {
        throw check::Failure("death before step " + std::to_string(dies_at) + ": " +
                             result.violation + " (seed " + std::to_string(result.seed) + ")");
      }
    }
    std::printf("      %d ranks: before each of %d steps\n", ranks, steps - 1);
  }
}

TEST(a_failure_replays_from_its_seed) {
  const Scenario wrong = [](Setup& setup) {
    alignas(64) static std::atomic<int> flags[2];
    flags[0].store(0);
    flags[1].store(0);
    setup.share(flags, sizeof(flags));
    const auto seen = std::make_shared<int>(0);
    for (int me = 0; me < 2; ++me) {
      setup.threads.push_back([=] {
        flags[me].store(1, std::memory_order_release);
        *seen += flags[1 - me].load(std::memory_order_acquire);
      });
    }
    setup.after = [=] { explore::require(*seen > 0, "both saw the old value"); };
  };
  const auto found = explore::run(wrong, {});
  CHECK_EQUAL(found.violation, std::string("both saw the old value"));
  const auto again = explore::run(wrong, {.seed = found.seed, .executions = 1});
  CHECK_EQUAL(again.violation, found.violation);
}

TEST(every_weakened_order_is_caught) {
  // What may be weaker without harm, and why.
  const std::map<std::string, std::string> harmless = {
      {"rings_.load(std::memory_order_acquire)", "the fences on both sides order rings_ too"},
      {"rings_.fetch_add(1, std::memory_order_release)", "as above"},
      {"state_.compare_exchange_strong", "what follows it is ordered by the fence of post()"},
      {"phase.load(std::memory_order_acquire)", "the fence of all_sound() follows it"},
      {"return state_.load(std::memory_order_acquire) == 0",
       "the fence of all_sound() precedes it"},
      {"sequence.load(std::memory_order_acquire) != sequence)", "only its value counts"},
      {"word_.load(std::memory_order_acquire)", "nothing that the dead rank wrote is read for it"},
  };
  const auto all = scenarios();
  for (const Named& named : all) explore::run(named.scenario, {.executions = 50});
  const auto sites = explore::sites();
  CHECK(sites.size() > 20);
  std::vector<std::string> missed;
  for (const explore::Site& site : sites) {
    const std::string text = site.describe();
    if (contains(text, "test_protocol.cpp") || contains(text, "doorbell.h")) continue;  // see above
    const auto reason = std::find_if(harmless.begin(), harmless.end(), [&](const auto& entry) {
      return contains(text, entry.first);
    });
    const bool known = reason != harmless.end();
    std::string caught;
    const auto try_to_catch = [&](const Named& named, std::uint64_t executions) {
      if (!caught.empty()) return;
      const auto result = explore::run(
          named.scenario, {.seed = 77, .executions = executions, .weakened = site.address});
      if (result.violation.empty()) return;
      caught = std::string(named.name) + ", execution " + std::to_string(result.executions) + ": " +
               result.violation;
    };
    // Most are caught at once by the scenario that is about them.
    for (const std::uint64_t executions : {30, 300}) {
      for (const Named& named : all) try_to_catch(named, executions);
    }
    if (!known || effort() > 1) {
      for (const Named& named : all) try_to_catch(named, named.executions * effort());
    }
    std::printf("      %s\n        %s\n", text.c_str(),
                !caught.empty() ? caught.c_str()
                : known         ? ("harmless: " + reason->second).c_str()
                                : "-");
    if (caught.empty() != known) missed.push_back(text);
  }
  for (const auto& text : missed) std::printf("      unexpected: %s\n", text.c_str());
  CHECK(missed.empty());
}
