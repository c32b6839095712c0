#include "double/clique.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <span>
#include <type_traits>

namespace gpu_double {
namespace {

// Bytes of zeros in a file are one, and it is never destroyed.
static_assert(std::is_trivially_destructible_v<Clique::Ranks>);

std::atomic<int> open_cliques{0};

std::span<const Seat> seats_of(const Clique::Ranks& ranks) {
  return std::span(ranks.seats).first(static_cast<std::size_t>(ranks.size));
}

}  // namespace

bool Clique::Ranks::complete() const {
  const auto seats = seats_of(*this);
  return std::all_of(seats.begin(), seats.end(), [](const Seat& seat) { return seat.taken; });
}

bool Clique::Ranks::has_window(std::size_t number) const {
  const auto seats = seats_of(*this);
  return std::all_of(seats.begin(), seats.end(),
                     [&](const Seat& seat) { return seat.windows > number; });
}

bool Clique::Ranks::windows_differ(std::size_t number) const {
  const auto seats = seats_of(*this);
  return std::any_of(seats.begin(), seats.end(), [&](const Seat& seat) {
    return seat.window_bytes[number % 2] != seats[0].window_bytes[number % 2];
  });
}

Clique::Clique() : Clique(SharedFile(sizeof(Ranks))) {
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&ranks_->mutex, &attributes);
  pthread_mutexattr_destroy(&attributes);
}

Clique::Clique(SharedFile file)
    : file_(std::move(file)),
      ranks_(reinterpret_cast<Ranks*>(file_.map(0, sizeof(Ranks), PROT_READ | PROT_WRITE))) {
  ++open_cliques;
}

std::shared_ptr<Clique> Clique::find(const SharedFile::Name& name) {
  auto file = SharedFile::find(name);
  if (!file) return nullptr;
  return std::shared_ptr<Clique>(new Clique(std::move(*file)));
}

Clique::~Clique() {
  munmap(ranks_, sizeof(Ranks));
  --open_cliques;
}

int Clique::open_count() { return open_cliques; }

Clique::Lock::Lock(Ranks& ranks) : ranks_(ranks) {
  if (pthread_mutex_lock(&ranks.mutex) == EOWNERDEAD) {
    ranks.broken = true;
    pthread_mutex_consistent(&ranks.mutex);
  }
}

Clique::Lock::~Lock() { pthread_mutex_unlock(&ranks_.mutex); }

}  // namespace gpu_double
