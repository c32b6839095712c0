#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <queue>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "machine.h"
#include "random.h"
#include "transport/channel.h"

namespace simulation {

/// How the simulated MPI behaves, drawn from the seed.
struct Weather {
  nanoseconds latency{20'000};
  /// A message takes up to so many times that, and others overtake it: all but those of its sender,
  /// receiver and tag.
  int spread = 4;
  /// Longer messages wait for their receive; the sender's memory is read only then.
  std::size_t eager_bytes = 4096;
  /// Of a message that leaves only once its sender has called MPI again, perhaps more than once.
  double held = 0.2;
  /// Whether MPI tells of a dead peer, as with ULFM; if not it is silent for ever.
  bool tells_of_deaths = false;
};

/// The messages between the ranks, as MPI moves them: nothing moves but in somebody's call.
///
/// What MPI allows itself is done here to those who rely on more: the memory of a receive changes
/// before it is over, that of a send is read late, and both go on after they were withdrawn.
class Network {
 public:
  Network(Machine& machine, int ranks, std::uint64_t seed, const Weather& weather);
  ~Network();

  std::vector<std::shared_ptr<pycomm::Channel>> channels();

  nanoseconds next_event() const;
  void do_events();

  /// The rank's process is gone: what has not left it never will.
  void kill(int rank);
  /// No message passes between these ranks and the others any more.
  void cut(const std::vector<int>& ranks);
  /// The rank has left pycomm and ends MPI, which waits for what it still holds.
  void finalize(int rank);

  /// What no caller may do; "" if nobody did.
  const std::string& misuse() const { return misuse_; }
  std::uint64_t messages() const { return messages_; }

 private:
  friend class SimulatedChannel;
  friend class SimulatedSend;
  friend class SimulatedReceive;
  struct Parcel;
  struct Receive;
  using Lane = std::tuple<int, int, int>;  // from, to, tag

  std::shared_ptr<Parcel> post(int from, int to, int tag, std::span<const std::byte> bytes);
  void await(const std::shared_ptr<Receive>& receive);
  /// The rank calls MPI: its messages move.
  void call(int rank);
  void move_sends(int rank);
  void depart(const std::shared_ptr<Parcel>& parcel);
  void write(Receive& receive);
  bool passes(int from, int to) const;
  /// Whether `rank` has been told that `peer` is dead.
  bool told_of(int rank, int peer) const;
  nanoseconds latency();
  void at(nanoseconds when, std::function<void()> event);

  Machine& machine_;
  Random random_;
  const Weather weather_;
  std::vector<pycomm::Simulation::ThreadId> users_;  // by rank: the thread that calls its channel
  std::vector<nanoseconds> died_;                    // by rank
  std::vector<bool> cut_;
  std::vector<bool> finalized_;
  std::map<Lane, std::deque<std::shared_ptr<Parcel>>> arrived_;
  std::vector<std::map<Lane, std::deque<std::shared_ptr<Receive>>>> waiting_;  // by receiver
  std::map<Lane, nanoseconds> last_arrival_;
  std::vector<std::deque<std::shared_ptr<Parcel>>> held_;   // by sender
  std::vector<std::deque<std::shared_ptr<Parcel>>> asked_;  // long ones that were asked for
  std::uint64_t arrivals_ = 0;
  struct Event {
    nanoseconds when;
    std::uint64_t number;
    std::function<void()> run;
    bool operator<(const Event& other) const {
      return std::tie(when, number) > std::tie(other.when, other.number);
    }
  };
  std::priority_queue<Event> events_;
  std::uint64_t event_number_ = 0;
  std::string misuse_;
  std::uint64_t messages_ = 0;
};

}  // namespace simulation
