#include "transport/channel_mpi.h"

#include <algorithm>
#include <climits>
#include <deque>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <map>
#include <string>
#include <utility>

#include "core/error.h"

namespace pycomm {

namespace {

/// Whether MPI may still be called. Python destroys objects in no certain order at exit, when
/// mpi4py may have finalised MPI already.
bool mpi_is_running() {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

int class_of(int code) {
  int error_class = MPI_ERR_UNKNOWN;
  MPI_Error_class(code, &error_class);
  return error_class;
}

/// Error classes that say: the peer died, or gave the communicator up. They came with ULFM, under
/// MPIX names at first; an MPI that has none of them ends the whole job instead.
constexpr std::initializer_list<int> kLostPeerClasses = {
#if defined(MPI_ERR_PROC_FAILED)
    MPI_ERR_PROC_FAILED,
#elif defined(MPIX_ERR_PROC_FAILED)
    MPIX_ERR_PROC_FAILED,
#endif
#if defined(MPI_ERR_REVOKED)
    MPI_ERR_REVOKED,
#elif defined(MPIX_ERR_REVOKED)
    MPIX_ERR_REVOKED,
#endif
#if defined(MPI_ERR_PROC_ABORTED)
    MPI_ERR_PROC_ABORTED,
#endif
};

bool means_lost_peer(int error_class) {
  return std::find(kLostPeerClasses.begin(), kLostPeerClasses.end(), error_class) !=
         kLostPeerClasses.end();
}

std::string text_of(int code) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) {
    return "MPI error " + std::to_string(code);
  }
  return std::string(text, length);
}

void check_setup(int code, const char* function) {
  if (code == MPI_SUCCESS) return;
  throw CommError(
      std::string("init: ") + function + " failed: " + text_of(code) +
      ".\n  Check that the job runs without pycomm: mpirun -np 2 python -m mpi4py.bench "
      "helloworld");
}

/// Both ends of a message, for errors.
struct Route {
  enum class Direction { kSend, kReceive };

  Direction direction;
  const Channel& channel;
  int peer;
  int tag;
  std::size_t bytes;
  bool at_most = false;  // a message may be shorter

  std::string others_log() const {
    return peer == MPI_ANY_SOURCE ? "the other ranks' logs"
                                  : "rank " + std::to_string(peer) + "'s log";
  }

  std::string awaited() const {
    if (peer == MPI_ANY_SOURCE) return "any rank to send (tag " + std::to_string(tag) + ")";
    return channel.name_of(peer) + (direction == Direction::kSend ? " to take " : " to send ") +
           (at_most ? "up to " : "") + std::to_string(bytes) + " bytes (tag " +
           std::to_string(tag) + ")";
  }

  void check(int code) const {
    if (code == MPI_SUCCESS) return;
    const std::string failed = std::string(Channel::kFailure) + " while rank " +
                               std::to_string(channel.rank()) + " waited for " + awaited() + ": ";
    if (means_lost_peer(class_of(code))) {
      throw PeerLostError(failed + "the peer is gone: " + text_of(code) + ".\n  Read " +
                          others_log() + " first.");
    }
    throw CommError(failed + text_of(code) + ".\n  Read " + others_log() +
                    " first; if it has no error, check the network between the hosts.");
  }
};

int mpi_count(const Route& route) {
  if (route.bytes > INT_MAX) {
    throw CommError("rank " + std::to_string(route.channel.rank()) + " cannot wait for " +
                    route.awaited() + ": one MPI message holds at most " + std::to_string(INT_MAX) +
                    " bytes.\n  Use smaller segments.");
  }
  return static_cast<int>(route.bytes);
}

/// An operation that MPI carries out; freed early, it goes on without its owner.
class Request {
 public:
  Request() = default;
  ~Request() {
    if (request_ != MPI_REQUEST_NULL && mpi_is_running()) MPI_Request_free(&request_);
  }
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  MPI_Request* address() { return &request_; }

  bool test(const Route& route) {
    int done = 0;
    route.check(MPI_Test(&request_, &done, MPI_STATUS_IGNORE));
    return done;
  }

 private:
  MPI_Request request_ = MPI_REQUEST_NULL;
};

}  // namespace

class MpiReceive;

/// The receives of one channel for which no message has come yet.
///
/// A receive is posted to MPI only when its message is there and has the right length. The MPI
/// standard leaves undefined what a longer message does besides raising an error, and Open MPI 5.0
/// does write all of a message beyond its eager limit over whatever follows a shorter buffer. It
/// also means that a withdrawn receive needs no MPI_Cancel.
///
/// Probe and receive get the same message because the communicator is the channel's alone and used
/// by one thread at a time.
class MpiInbox {
 public:
  explicit MpiInbox(MPI_Comm communicator) : communicator_(communicator) {}

  void add(MpiReceive* receive);
  void remove(MpiReceive* receive);

  /// Start every receive whose message has come. Each poll of the channel's messages does this for
  /// all of them, as MPI itself would: two ranks that wait for their sends first still meet.
  /// Cost: one MPI_Iprobe for each (peer, tag) waited for.
  void start_arrived();

 private:
  MPI_Comm communicator_;
  std::map<std::pair<int, int>, std::deque<MpiReceive*>> waiting_;  // by (peer, tag), oldest first
};

class MpiReceive : public Message {
 public:
  /// @param length  null: the message is as long as the route says.
  MpiReceive(std::shared_ptr<MpiInbox> inbox, const Route& route, std::byte* buffer,
             std::size_t* length)
      : inbox_(std::move(inbox)), route_(route), buffer_(buffer), length_(length) {
    inbox_->add(this);
  }
  /// Never blocks. A message that is arriving already still goes to the buffer.
  ~MpiReceive() override { inbox_->remove(this); }
  MpiReceive(const MpiReceive&) = delete;
  MpiReceive& operator=(const MpiReceive&) = delete;

  bool poll() override {
    if (done_) return true;
    if (!started_) inbox_->start_arrived();
    if (error_) std::rethrow_exception(error_);
    done_ = started_ && request_.test(route_);
    if (done_ && length_ != nullptr) *length_ = arriving_bytes_;
    return done_;
  }

  std::string describe() const override { return route_.awaited(); }

  const Route& route() const { return route_; }

  /// Look for the message, and receive it if it has come. False: it has not, or cannot be received,
  /// which poll() then throws: the poll that found it may be another operation's.
  bool start_if_arrived(MPI_Comm communicator) noexcept {
    if (error_) return false;
    try {
      int arrived = 0;
      MPI_Status status;
      route_.check(MPI_Iprobe(route_.peer, route_.tag, communicator, &arrived, &status));
      if (!arrived) return false;
      require_length(status);
      route_.check(MPI_Irecv(buffer_, static_cast<int>(arriving_bytes_), MPI_BYTE, route_.peer,
                             route_.tag, communicator, request_.address()));
      started_ = true;
    } catch (...) {
      error_ = std::current_exception();
    }
    return started_;
  }

 private:
  void require_length(const MPI_Status& status) {
    int length = 0;
    route_.check(MPI_Get_count(&status, MPI_BYTE, &length));
    arriving_bytes_ = static_cast<std::size_t>(length);
    if (arriving_bytes_ == route_.bytes) return;
    if (length_ != nullptr && arriving_bytes_ < route_.bytes) return;
    throw MismatchError("rank " + std::to_string(route_.channel.rank()) + " expected " +
                        std::to_string(route_.bytes) + " bytes from rank " +
                        std::to_string(route_.peer) + " (tag " + std::to_string(route_.tag) +
                        "), which sent " + std::to_string(length) +
                        ".\n  Every rank must issue the same collectives in the same order.");
  }

  std::shared_ptr<MpiInbox> inbox_;
  Route route_;
  std::byte* buffer_;
  std::size_t* length_;
  std::size_t arriving_bytes_ = 0;
  Request request_;
  std::exception_ptr error_;
  bool started_ = false;
  bool done_ = false;
};

void MpiInbox::add(MpiReceive* receive) {
  waiting_[{receive->route().peer, receive->route().tag}].push_back(receive);
}

void MpiInbox::remove(MpiReceive* receive) {
  const auto lane = waiting_.find({receive->route().peer, receive->route().tag});
  if (lane == waiting_.end()) return;
  std::erase(lane->second, receive);
  if (lane->second.empty()) waiting_.erase(lane);
}

void MpiInbox::start_arrived() {
  for (auto lane = waiting_.begin(); lane != waiting_.end();) {
    auto& receives = lane->second;
    while (!receives.empty() && receives.front()->start_if_arrived(communicator_)) {
      receives.pop_front();
    }
    lane = receives.empty() ? waiting_.erase(lane) : std::next(lane);
  }
}

namespace {

class MpiSend : public Message {
 public:
  MpiSend(std::shared_ptr<MpiInbox> inbox, MPI_Comm communicator, const Route& route,
          const std::byte* buffer)
      : inbox_(std::move(inbox)), route_(route) {
    route_.check(MPI_Isend(buffer, mpi_count(route_), MPI_BYTE, route_.peer, route_.tag,
                           communicator, request_.address()));
  }

  bool poll() override {
    if (done_) return true;
    inbox_->start_arrived();
    done_ = request_.test(route_);
    return done_;
  }

  std::string describe() const override { return route_.awaited(); }

 private:
  std::shared_ptr<MpiInbox> inbox_;
  Route route_;
  Request request_;
  bool done_ = false;
};

}  // namespace

MpiChannel::MpiChannel(MPI_Comm original) {
  // Without the original's hints: one of them (mpi_assert_allow_overtaking) gives up the order.
  check_setup(MPI_Comm_dup_with_info(original, MPI_INFO_NULL, &communicator_),
              "MPI_Comm_dup_with_info");
  check_setup(MPI_Comm_set_errhandler(communicator_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check_setup(MPI_Comm_rank(communicator_, &rank_), "MPI_Comm_rank");
  check_setup(MPI_Comm_size(communicator_, &size_), "MPI_Comm_size");
  inbox_ = std::make_shared<MpiInbox>(communicator_);
}

std::unique_ptr<Message> MpiChannel::send(int peer, int tag, std::span<const std::byte> bytes) {
  const Route route{Route::Direction::kSend, *this, peer, tag, bytes.size()};
  return std::make_unique<MpiSend>(inbox_, communicator_, route, bytes.data());
}

std::unique_ptr<Message> MpiChannel::receive(int peer, int tag, std::span<std::byte> bytes) {
  const Route route{Route::Direction::kReceive, *this, peer, tag, bytes.size()};
  return std::make_unique<MpiReceive>(inbox_, route, bytes.data(), nullptr);
}

std::unique_ptr<Message> MpiChannel::receive_at_most(int peer, int tag, std::span<std::byte> room,
                                                     std::size_t& length) {
  const Route route{Route::Direction::kReceive, *this, peer, tag, room.size(), /*at_most=*/true};
  return std::make_unique<MpiReceive>(inbox_, route, room.data(), &length);
}

std::optional<Channel::Incoming> MpiChannel::probe(int tag) {
  const auto look = [&](int peer) -> std::optional<Incoming> {
    const Route route{Route::Direction::kReceive, *this, peer, tag, 0};
    int arrived = 0;
    int length = 0;
    MPI_Status status;
    const int code = MPI_Iprobe(peer, tag, communicator_, &arrived, &status);
    if (code != MPI_SUCCESS && means_lost_peer(class_of(code))) {
      has_lost_peer_ = true;
      return std::nullopt;
    }
    route.check(code);
    if (!arrived) return std::nullopt;
    route.check(MPI_Get_count(&status, MPI_BYTE, &length));
    return Incoming{status.MPI_SOURCE, static_cast<std::size_t>(length)};
  };
  if (!has_lost_peer_) {
    const auto found = look(MPI_ANY_SOURCE);
    if (!has_lost_peer_) return found;
  }
  // With a rank gone MPI refuses to look for messages of any rank: it might wait for that one's.
  for (int turn = 0; turn < size_; ++turn) {
    next_probed_ = (next_probed_ + 1) % size_;
    if (const auto found = look(next_probed_)) return found;
  }
  return std::nullopt;
}

void MpiChannel::progress() {
  // Any call that looks for messages makes MPI move what it still holds.
  int arrived = 0;
  MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, communicator_, &arrived, MPI_STATUS_IGNORE);
}

}  // namespace pycomm
