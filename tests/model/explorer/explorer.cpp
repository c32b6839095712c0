#include "explorer.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <utility>

// What the linker calls the functions of libc, for which it puts ours (--wrap).
extern "C" {
void* __real_memcpy(void* target, const void* source, std::size_t bytes);
void* __real_memset(void* target, int value, std::size_t bytes);
}

namespace explore {
namespace {

constexpr std::size_t kMostThreads = 4;
constexpr std::size_t kMostLocations = 40;
constexpr std::size_t kStackBytes = 256 << 10;
/// Many more than any execution takes that ends.
constexpr std::uint64_t kMostSteps = 20000;
/// How often in a row a thread may read one store of an object that has a newer one: stores become
/// visible in the end.
constexpr int kMostStaleReads = 2;

using Epoch = std::uint32_t;

/// What a thread knows, or a store passes on.
struct View {
  /// Up to which epoch of each thread everything happens before.
  std::array<Epoch, kMostThreads> before{};
  /// By location, the number of the oldest store that is not hidden.
  std::array<std::uint32_t, kMostLocations> seen{};

  void join_seen(const View& other) {
    for (std::size_t i = 0; i < seen.size(); ++i) seen[i] = std::max(seen[i], other.seen[i]);
  }
  void join(const View& other) {
    for (std::size_t i = 0; i < before.size(); ++i)
      before[i] = std::max(before[i], other.before[i]);
    join_seen(other);
  }
};

struct Store {
  std::uint64_t value;
  View passes_on;
};

/// An atomic object.
struct Location {
  std::uintptr_t address;
  std::vector<Store> stores;
  std::array<int, kMostThreads> stale_reads{};
};

/// The last accesses to a byte of shared memory that is no atomic object's.
struct Byte {
  std::uint64_t execution = 0;
  int writer = -1;
  Epoch written = 0;
  std::array<Epoch, kMostThreads> read{};
};

struct Region {
  std::uintptr_t begin;
  std::uintptr_t end;
  std::vector<Byte> bytes;
};

struct Thread {
  enum class State { kReady, kPausing, kSleeping, kOver, kDead };
  State state = State::kReady;
  ucontext_t context;
  std::function<void()> body;
  View now;
  View at_release_fence;
  View relaxed_loads;
  int steps = 0;
  std::uint64_t own_stores = 0;
  std::uint64_t looked_at = 0;    // others' stores when it last began to look
  bool missed_something = false;  // read a store that was not the newest since then
  const void* sleeps_on = nullptr;
};

/// Makes decisions: the next of a search, or random ones.
class Decisions {
 public:
  void begin_random(std::uint64_t seed) {
    random_.seed(seed);
    searching_ = false;
    // Some executions switch often, some hardly ever; some read old stores often.
    switch_one_in_ = 1u + (1u << random_() % 5);
    old_one_in_ = 1u + (1u << random_() % 4);
  }
  void begin_search() {
    searching_ = true;
    at_ = 0;
  }
  bool searching() const { return searching_; }

  std::size_t choose(std::size_t count) {
    if (count <= 1) return 0;
    if (!searching_) return random_() % count;
    if (at_ == trail_.size()) trail_.push_back({0, count});
    return trail_[at_++].first;
  }
  bool switches() { return random_() % switch_one_in_ == 0; }
  bool reads_old() { return random_() % old_one_in_ == 0; }

  /// The next trail of the search; false: there is none.
  bool advance() {
    trail_.resize(std::min(at_, trail_.size()));
    while (!trail_.empty() && trail_.back().first + 1 == trail_.back().second) trail_.pop_back();
    if (trail_.empty()) return false;
    ++trail_.back().first;
    return true;
  }
  void forget() { trail_.clear(); }

 private:
  std::mt19937_64 random_;
  unsigned switch_one_in_ = 2;
  unsigned old_one_in_ = 2;
  bool searching_ = false;
  std::size_t at_ = 0;
  std::vector<std::pair<std::size_t, std::size_t>> trail_;  // decision, of how many
};

/// The one execution at a time.
struct Execution {
  bool running = false;
  std::uint64_t number = 0;
  Plan plan;
  Decisions decisions;
  std::vector<Region> regions;
  std::vector<Location> locations;
  View fences;  // what sequentially consistent fences have passed on; `seen` only
  std::array<Thread, kMostThreads> threads;
  std::size_t thread_count = 0;
  std::size_t current = 0;
  std::uint64_t stores = 0;
  std::uint64_t steps = 0;
  int preemptions = 0;
  std::string violation;
  ucontext_t scheduler;
  std::vector<void*> life_words;
  std::size_t mortal = 0;
  int dies_at = -1;
  bool sleeps_end = false;
};

Execution execution;
std::vector<Site> known_sites;
Membarrier membarrier_kind = Membarrier::kReachesAll;
std::array<std::unique_ptr<char[]>, kMostThreads> stacks;

Thread& me() { return execution.threads[execution.current]; }

std::uint64_t stores_of_others(const Thread& thread) {
  return execution.stores - thread.own_stores;
}

bool can_run(const Thread& thread) {
  return thread.state == Thread::State::kReady ||
         (thread.state == Thread::State::kPausing &&
          (thread.missed_something || stores_of_others(thread) != thread.looked_at));
}

Region* region_of(const volatile void* address) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  for (Region& region : execution.regions) {
    if (at >= region.begin && at < region.end) return &region;
  }
  return nullptr;
}

bool followed(const volatile void* address) {
  return execution.running && region_of(address) != nullptr;
}

void leave_to_scheduler() { swapcontext(&me().context, &execution.scheduler); }

/// What the kernel does when a process dies.
void die() {
  Thread& thread = me();
  thread.state = Thread::State::kDead;
  execution.sleeps_end = true;  // nobody rings when a rank dies
  auto* word = static_cast<std::uint32_t*>(execution.life_words[execution.current]);
  for (Location& location : execution.locations) {
    if (location.address != reinterpret_cast<std::uintptr_t>(word)) continue;
    location.stores.push_back({location.stores.back().value | FUTEX_OWNER_DIED, thread.now});
  }
  *word |= FUTEX_OWNER_DIED;
  ++execution.stores;
  leave_to_scheduler();
}

/// Before every step that others can see.
void step() {
  Thread& thread = me();
  if (++execution.steps > kMostSteps) violation("an execution has no end");
  if (!execution.life_words.empty() && execution.current == execution.mortal &&
      thread.steps == execution.dies_at) {
    die();
  }
  ++thread.steps;
  const bool switches =
      execution.decisions.searching()
          ? execution.preemptions < execution.plan.preemptions && execution.decisions.choose(2) == 1
          : execution.decisions.switches();
  if (!switches) return;
  ++execution.preemptions;
  leave_to_scheduler();
}

Location& location_of(const volatile void* address, std::uint64_t value) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  for (Location& location : execution.locations) {
    if (location.address == at) return location;
  }
  if (execution.locations.size() == kMostLocations) violation("too many atomic objects");
  execution.locations.push_back({at, {{value, {}}}, {}});
  return execution.locations.back();
}

std::size_t index_of(const Location& location) {
  return static_cast<std::size_t>(&location - execution.locations.data());
}

int effective(const void* site, Site::Kind kind, int order) {
  if (order == __ATOMIC_RELAXED) return order;
  const auto known = std::find_if(known_sites.begin(), known_sites.end(),
                                  [&](const Site& other) { return other.address == site; });
  if (known == known_sites.end()) known_sites.push_back({site, kind, order});
  return site == execution.plan.weakened ? __ATOMIC_RELAXED : order;
}

bool acquires(int order) {
  return order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
}
bool releases(int order) {
  return order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
}

void take_over(const Store& store, int order) {
  if (acquires(order)) {
    me().now.join(store.passes_on);
  } else {
    me().relaxed_loads.join(store.passes_on);
  }
}

std::uint64_t load(Location& location, int order) {
  Thread& thread = me();
  const std::size_t index = index_of(location);
  const std::size_t newest = location.stores.size() - 1;
  std::size_t oldest = thread.now.seen[index];
  int& stale = location.stale_reads[execution.current];
  std::size_t chosen = newest;
  if (oldest < newest && stale < kMostStaleReads) {
    if (execution.decisions.searching()) {
      chosen = newest - execution.decisions.choose(2);
    } else if (execution.decisions.reads_old()) {
      chosen = oldest + execution.decisions.choose(newest - oldest + 1);
    }
  }
  stale = chosen < newest ? stale + 1 : 0;
  thread.missed_something |= chosen < newest;
  thread.now.seen[index] = static_cast<std::uint32_t>(chosen);
  take_over(location.stores[chosen], order);
  return location.stores[chosen].value;
}

/// @param continues  the store that a read-modify-write has read.
void store(Location& location, std::uint64_t value, int order, const Store* continues) {
  Thread& thread = me();
  View passes_on = releases(order) ? thread.now : thread.at_release_fence;
  if (continues != nullptr) passes_on.join(continues->passes_on);
  const std::size_t index = index_of(location);
  const auto number = static_cast<std::uint32_t>(location.stores.size());
  passes_on.seen[index] = std::max(passes_on.seen[index], number);
  thread.now.seen[index] = number;
  location.stores.push_back({value, passes_on});
  location.stale_reads.fill(0);
  if (releases(order)) ++thread.now.before[execution.current];
  ++execution.stores;
  ++thread.own_stores;
}

/// Returns what was there. `change` gives the new value, or nothing.
template <typename Change>
std::uint64_t modify(Location& location, int order, const Change& change) {
  const Store read = location.stores.back();
  me().now.seen[index_of(location)] = static_cast<std::uint32_t>(location.stores.size() - 1);
  take_over(read, order);
  std::uint64_t value = read.value;
  if (change(value)) store(location, value, order, &read);
  return read.value;
}

void fence(int order) {
  Thread& thread = me();
  if (acquires(order)) thread.now.join(thread.relaxed_loads);
  if (order == __ATOMIC_SEQ_CST) {
    execution.fences.join_seen(thread.now);
    thread.now.join_seen(execution.fences);
  }
  if (releases(order)) {
    thread.at_release_fence = thread.now;
    ++thread.now.before[execution.current];
  }
}

/// A full fence in the midst of whatever each thread is doing.
void membarrier() {
  if (membarrier_kind == Membarrier::kReachesNobody) return fence(__ATOMIC_SEQ_CST);
  for (Thread& thread : execution.threads) execution.fences.join_seen(thread.now);
  for (Thread& thread : execution.threads) thread.now.join_seen(execution.fences);
}

std::string line_of(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) return "?";
  char command[128];
  std::snprintf(command, sizeof(command), "addr2line -i -e /proc/%d/exe %#lx", getpid(),
                static_cast<unsigned long>(reinterpret_cast<std::uintptr_t>(address) - 1 -
                                           reinterpret_cast<std::uintptr_t>(info.dli_fbase)));
  std::FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "?";
  char text[512];
  std::string found = "?";
  while (std::fgets(text, sizeof(text), pipe) != nullptr) {
    std::string line(text);
    line.erase(std::min(line.find_first_of(" \n"), line.size()));
    const bool ours =
        line.find("/csrc/") != std::string::npos || line.find("/tests/model/") != std::string::npos;
    if (found == "?" && ours) found = line;  // not the library's, which was inlined
  }
  pclose(pipe);
  return found;
}

void access(const volatile void* address, std::size_t bytes, bool writes, const void* site) {
  Region* const region = region_of(address);
  if (region == nullptr) return;
  const std::size_t begin = reinterpret_cast<std::uintptr_t>(address) - region->begin;
  const View& now = me().now;
  const std::size_t end = std::min(begin + bytes, region->bytes.size());
  for (std::size_t i = begin; i < end; ++i) {
    Byte& byte = region->bytes[i];
    if (byte.execution != execution.number) {
      byte = Byte();
      byte.execution = execution.number;
    }
    bool races =
        byte.writer >= 0 && byte.written > now.before[static_cast<std::size_t>(byte.writer)];
    for (std::size_t reader = 0; writes && reader < kMostThreads; ++reader) {
      races |= reader != execution.current && byte.read[reader] > now.before[reader];
    }
    if (races) {
      violation(std::string("a race: thread ") + std::to_string(execution.current) +
                (writes ? " writes" : " reads") + " byte " + std::to_string(i) +
                " of shared memory at " + line_of(site));
    }
    if (writes) {
      byte.writer = static_cast<int>(execution.current);
      byte.written = now.before[execution.current];
    } else {
      byte.read[execution.current] = now.before[execution.current];
    }
  }
}

/// A violation found when the threads had ended.
struct AfterTheThreads {};

void enter(unsigned index) {
  execution.threads[index].body();
  execution.threads[index].state = Thread::State::kOver;
  leave_to_scheduler();
}

/// Whose turn it is next; kMostThreads: nobody's.
std::size_t next_thread(std::size_t last) {
  std::vector<std::size_t> ready;
  for (std::size_t i = 0; i < execution.thread_count; ++i) {
    if (can_run(execution.threads[i])) ready.push_back(i);
  }
  // Who was preempted, or found nothing new, lets others go first.
  if (ready.size() > 1) std::erase(ready, last);
  if (!ready.empty()) return ready[execution.decisions.choose(ready.size())];
  if (!execution.sleeps_end) return kMostThreads;
  for (std::size_t i = 0; i < execution.thread_count; ++i) {
    const auto state = execution.threads[i].state;
    if (state == Thread::State::kSleeping || state == Thread::State::kPausing) ready.push_back(i);
  }
  return ready.empty() ? kMostThreads : ready[execution.decisions.choose(ready.size())];
}

/// Runs the threads to their ends.
void schedule() {
  std::size_t last = kMostThreads;
  while (execution.violation.empty()) {
    const std::size_t next = next_thread(last);
    if (next == kMostThreads) break;
    if (++execution.steps > kMostSteps) {
      execution.violation = "an execution has no end";
      break;
    }
    Thread& thread = execution.threads[next];
    if (thread.state == Thread::State::kPausing) {
      thread.looked_at = stores_of_others(thread);
      thread.missed_something = false;
    }
    thread.state = Thread::State::kReady;
    execution.current = last = next;
    swapcontext(&execution.scheduler, &thread.context);
  }
  for (std::size_t i = 0; i < execution.thread_count && execution.violation.empty(); ++i) {
    const auto state = execution.threads[i].state;
    if (state != Thread::State::kOver && state != Thread::State::kDead) {
      execution.violation = "thread " + std::to_string(i) +
                            (state == Thread::State::kSleeping ? " sleeps" : " waits") +
                            " for ever";
    }
  }
}

void run_once(const Scenario& scenario) {
  execution.running = false;
  execution.locations.clear();
  execution.fences = View();
  execution.violation.clear();
  execution.stores = execution.steps = 0;
  execution.preemptions = 0;
  ++execution.number;
  for (Region& region : execution.regions) region.end = region.begin;  // none is shared yet
  membarrier_kind = Membarrier::kReachesAll;
  Setup setup;
  scenario(setup);
  execution.thread_count = setup.threads.size();
  execution.life_words = setup.life_words;
  execution.mortal = setup.mortal;
  execution.sleeps_end = setup.sleeps_end;
  for (std::size_t i = 0; i < setup.threads.size(); ++i) {
    Thread& thread = execution.threads[i];
    thread = Thread();
    thread.body = std::move(setup.threads[i]);
    thread.now.before[i] = 1;
    if (!stacks[i]) stacks[i] = std::make_unique<char[]>(kStackBytes);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[i].get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, reinterpret_cast<void (*)()>(&enter), 1, static_cast<unsigned>(i));
  }
  execution.running = true;
  schedule();
  execution.running = false;
  if (execution.violation.empty() && setup.after) {
    try {
      setup.after();
    } catch (const AfterTheThreads&) {
      // noted
    }
  }
}

}  // namespace

void Setup::share(const void* memory, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  for (Region& region : execution.regions) {
    if (region.begin == begin && region.bytes.size() == bytes) {
      region.end = begin + bytes;
      return;
    }
  }
  // Another scenario's, at the same place perhaps.
  std::erase_if(execution.regions, [](const Region& region) { return region.begin == region.end; });
  execution.regions.push_back({begin, begin + bytes, std::vector<Byte>(bytes)});
}

Result run(const Scenario& scenario, const Plan& plan) {
  Result result;
  execution.plan = plan;
  execution.decisions.forget();
  std::mt19937_64 deaths(plan.seed);
  for (std::uint64_t i = 0; i < plan.executions; ++i) {
    execution.dies_at = plan.dies_at;
    if (plan.dies_at < 0) {
      // One in eight lives; the more is known of how long a thread lives, the later it may die.
      const auto range = static_cast<std::uint64_t>(std::max(8, result.mortal_steps));
      execution.dies_at = deaths() % 8 == 0 ? -1 : static_cast<int>(deaths() % range);
    }
    if (plan.preemptions < 0) {
      execution.decisions.begin_random(plan.seed + i);
    } else {
      execution.decisions.begin_search();
    }
    run_once(scenario);
    ++result.executions;
    result.steps += execution.steps;
    result.mortal_steps = std::max(result.mortal_steps, execution.threads[execution.mortal].steps);
    if (!execution.violation.empty()) {
      result.violation = execution.violation;
      result.seed = plan.seed + i;
      break;
    }
    if (plan.preemptions >= 0 && !execution.decisions.advance()) {
      result.complete = true;
      break;
    }
  }
  execution.plan.weakened = nullptr;
  return result;
}

const std::vector<Site>& sites() { return known_sites; }

std::string Site::describe() const {
  const std::string line = line_of(address);
  const std::size_t colon = line.rfind(':');
  if (colon == std::string::npos) return "a function of std::atomic<bool>";  // not inlined
  // From the root on: a compiler's cache may have the file from another folder.
  const std::size_t root = std::min(line.rfind("/csrc/"), line.rfind("/tests/model/"));
  std::ifstream file(SOURCE_DIR + line.substr(root, colon - root));
  std::string text;
  for (int number = std::atoi(line.c_str() + colon + 1); number > 0; --number) {
    std::getline(file, text);
  }
  text.erase(0, text.find_first_not_of(' '));
  return line.substr(line.rfind('/') + 1) + ": " + text;
}

void pause() {
  Thread& thread = me();
  thread.state = Thread::State::kPausing;
  leave_to_scheduler();
}

void violation(const std::string& text) {
  if (execution.violation.empty()) execution.violation = text;
  if (!execution.running) throw AfterTheThreads();
  leave_to_scheduler();
  std::abort();  // never resumed
}

void set_membarrier(Membarrier kind) { membarrier_kind = kind; }

}  // namespace explore

// --- what the compiler, and the code under test, call
// -----------------------------------------------

namespace {

using explore::Site;

#define SITE __builtin_return_address(0)

template <typename T>
T atomic_load(const volatile T* address, int order, const void* site) {
  if (!explore::followed(address)) return __atomic_load_n(address, __ATOMIC_SEQ_CST);
  explore::step();
  order = explore::effective(site, Site::Kind::kLoad, order);
  return static_cast<T>(explore::load(explore::location_of(address, *address), order));
}

template <typename T>
void atomic_store(volatile T* address, T value, int order, const void* site) {
  if (!explore::followed(address)) return __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
  explore::step();
  order = explore::effective(site, Site::Kind::kStore, order);
  explore::store(explore::location_of(address, *address), value, order, nullptr);
  *address = value;
}

template <typename T, typename Change>
T atomic_modify(volatile T* address, int order, const void* site, const Change& change) {
  if (!explore::followed(address)) {
    T old = *address;  // fibers share one thread, and others do not come here
    T value = old;
    if (change(value)) *address = value;
    return old;
  }
  explore::step();
  order = explore::effective(site, Site::Kind::kReadModifyWrite, order);
  const auto old =
      explore::modify(explore::location_of(address, *address), order, [&](std::uint64_t& wide) {
        auto value = static_cast<T>(wide);
        if (!change(value)) return false;
        wide = value;
        *address = value;
        return true;
      });
  return static_cast<T>(old);
}

template <typename T>
bool atomic_exchange_if(volatile T* address, T* expected, T desired, int order, const void* site) {
  const T wanted = *expected;
  const T old = atomic_modify(address, order, site, [&](T& value) {
    if (value != wanted) return false;
    value = desired;
    return true;
  });
  *expected = old;
  return old == wanted;
}

void plain(const volatile void* address, std::size_t bytes, bool writes, const void* site) {
  if (explore::followed(address)) explore::access(address, bytes, writes, site);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define PLAIN(bytes)                                                             \
  void __tsan_read##bytes(void* at) { plain(at, bytes, false, SITE); }           \
  void __tsan_write##bytes(void* at) { plain(at, bytes, true, SITE); }           \
  void __tsan_unaligned_read##bytes(void* at) { plain(at, bytes, false, SITE); } \
  void __tsan_unaligned_write##bytes(void* at) { plain(at, bytes, true, SITE); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
void __tsan_read_range(void* at, std::size_t bytes) { plain(at, bytes, false, SITE); }
void __tsan_write_range(void* at, std::size_t bytes) { plain(at, bytes, true, SITE); }

#define ATOMIC(bits)                                                                               \
  std::uint##bits##_t __tsan_atomic##bits##_load(const volatile std::uint##bits##_t* at,           \
                                                 int order) {                                      \
    return atomic_load(at, order, SITE);                                                           \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile std::uint##bits##_t* at, std::uint##bits##_t value,    \
                                   int order) {                                                    \
    atomic_store(at, value, order, SITE);                                                          \
  }                                                                                                \
  std::uint##bits##_t __tsan_atomic##bits##_exchange(volatile std::uint##bits##_t* at,             \
                                                     std::uint##bits##_t value, int order) {       \
    return atomic_modify(at, order, SITE, [&](auto& old) { return old = value, true; });           \
  }                                                                                                \
  std::uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile std::uint##bits##_t* at,            \
                                                      std::uint##bits##_t value, int order) {      \
    return atomic_modify(at, order, SITE, [&](auto& old) { return old += value, true; });          \
  }                                                                                                \
  std::uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile std::uint##bits##_t* at,            \
                                                      std::uint##bits##_t value, int order) {      \
    return atomic_modify(at, order, SITE, [&](auto& old) { return old -= value, true; });          \
  }                                                                                                \
  std::uint##bits##_t __tsan_atomic##bits##_fetch_or(volatile std::uint##bits##_t* at,             \
                                                     std::uint##bits##_t value, int order) {       \
    return atomic_modify(at, order, SITE, [&](auto& old) { return old |= value, true; });          \
  }                                                                                                \
  std::uint##bits##_t __tsan_atomic##bits##_fetch_and(volatile std::uint##bits##_t* at,            \
                                                      std::uint##bits##_t value, int order) {      \
    return atomic_modify(at, order, SITE, [&](auto& old) { return old &= value, true; });          \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile std::uint##bits##_t* at,              \
                                                    std::uint##bits##_t* expected,                 \
                                                    std::uint##bits##_t desired, int order, int) { \
    return atomic_exchange_if(at, expected, desired, order, SITE);                                 \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile std::uint##bits##_t* at,                \
                                                  std::uint##bits##_t* expected,                   \
                                                  std::uint##bits##_t desired, int order, int) {   \
    return atomic_exchange_if(at, expected, desired, order, SITE);                                 \
  }
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)

void __tsan_atomic_thread_fence(int order) {
  if (!explore::execution.running) return;
  explore::step();
  order = explore::effective(SITE, Site::Kind::kFence, order);
  if (order != __ATOMIC_RELAXED) explore::fence(order);
}
void __tsan_atomic_signal_fence(int) {}

void* __wrap_memcpy(void* target, const void* source, std::size_t bytes) {
  plain(source, bytes, false, SITE);
  plain(target, bytes, true, SITE);
  return __real_memcpy(target, source, bytes);
}

void* __wrap_memset(void* target, int value, std::size_t bytes) {
  plain(target, bytes, true, SITE);
  return __real_memset(target, value, bytes);
}

long __wrap_syscall(long number, ...) {
  va_list arguments;
  va_start(arguments, number);
  if (number == SYS_membarrier) {
    const int command = va_arg(arguments, int);
    va_end(arguments);
    if (explore::membarrier_kind == explore::Membarrier::kRefused) {
      errno = ENOSYS;
      return -1;
    }
    if (explore::execution.running && command == MEMBARRIER_CMD_GLOBAL_EXPEDITED) {
      explore::step();
      const int order = explore::effective(SITE, Site::Kind::kMembarrier, __ATOMIC_SEQ_CST);
      if (order != __ATOMIC_RELAXED) explore::membarrier();
    }
    return 0;
  }
  if (number != SYS_futex) std::abort();
  auto* word = va_arg(arguments, std::uint32_t*);
  const int operation = va_arg(arguments, int);
  const auto value = va_arg(arguments, std::uint32_t);
  va_end(arguments);
  explore::step();
  if (operation == FUTEX_WAKE) {
    for (auto& thread : explore::execution.threads) {
      if (thread.state == explore::Thread::State::kSleeping && thread.sleeps_on == word) {
        thread.state = explore::Thread::State::kReady;
      }
    }
  } else if (*word == value) {  // the kernel looks at it under a lock of its own
    explore::me().sleeps_on = word;
    explore::me().state = explore::Thread::State::kSleeping;
    explore::leave_to_scheduler();
  }
  return 0;
}

}  // extern "C"
