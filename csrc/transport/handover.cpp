#include "transport/handover.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/system_error.h"

namespace pycomm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kInterruptEvery{50};
// What a process that ends may still take when its sockets are closed; a large one has torn its
// memory down before.
constexpr std::chrono::milliseconds kTeardown{500};
constexpr const char* kRemedy = "Unix sockets must work between the ranks of a host.";

/// The abstract namespace: the first byte of the path is 0, the length ends the name.
std::pair<sockaddr_un, socklen_t> socket_address(const std::string& name) {
  if (!Handover::is_address(name)) throw CommError("init: '" + name + "' is no address of a rank.");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

/// What opens a hand-over: the proof that the caller belongs to this job.
struct Hello {
  std::array<char, Handover::kTokenLength> token;

  /// Takes as long whatever the difference.
  bool operator==(const Hello& other) const {
    unsigned difference = 0;
    for (std::size_t i = 0; i < token.size(); ++i) {
      difference |= static_cast<unsigned char>(token[i] ^ other.token[i]);
    }
    return difference == 0;
  }
};

constexpr std::string_view kPrefix = "pycomm-";
constexpr int kNameBytes = 16;  // random ones

Descriptor open_socket() {
  Descriptor opened(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (opened.get() < 0) throw_system_error("socket(AF_UNIX)", kRemedy);
  return opened;
}

ucred peer_behind(int socket) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) {
    throw_system_error("getsockopt(SO_PEERCRED)", kRemedy);
  }
  return peer;
}

/// What can be read once the process has ended; none if it cannot be seen from here.
Descriptor open_process(pid_t process) {
  return Descriptor(process > 0 ? static_cast<int>(syscall(SYS_pidfd_open, process, 0)) : -1);
}

/// Somebody who has called and not yet said enough to be known.
struct Caller {
  Descriptor socket;
  Hello hello{};
  std::size_t received = 0;

  enum class Says : std::uint8_t { kMore, kHello, kNothing };
  /// Read what has come, and never wait for the rest.
  Says listen() {
    const ssize_t bytes = recv(socket.get(), hello.token.data() + received,
                               hello.token.size() - received, MSG_DONTWAIT);
    if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) return Says::kMore;
    if (bytes <= 0) return Says::kNothing;
    received += static_cast<std::size_t>(bytes);
    return received == hello.token.size() ? Says::kHello : Says::kMore;
  }
};

/// A message of one byte that carries one descriptor.
struct DescriptorMessage {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr header{};

  DescriptorMessage() {
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
  }
  DescriptorMessage(const DescriptorMessage&) = delete;  // it points into itself
  DescriptorMessage& operator=(const DescriptorMessage&) = delete;
};

/// False: the other one has hung up.
bool send_descriptor(int socket, int descriptor) {
  DescriptorMessage message;
  cmsghdr* rights = CMSG_FIRSTHDR(&message.header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(rights), &descriptor, sizeof(int));
  if (sendmsg(socket, &message.header, MSG_NOSIGNAL) == 1) return true;
  if (errno != EPIPE && errno != ECONNRESET) throw_system_error("sendmsg", kRemedy);
  return false;
}

/// None: the other one, who is `whom`, has hung up.
Descriptor receive_descriptor(int socket, const std::string& whom) {
  DescriptorMessage message;
  if (recvmsg(socket, &message.header, MSG_CMSG_CLOEXEC) != 1) return Descriptor(-1);
  const cmsghdr* rights = CMSG_FIRSTHDR(&message.header);
  if (rights == nullptr || rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS ||
      rights->cmsg_len != CMSG_LEN(sizeof(int)) || (message.header.msg_flags & MSG_CTRUNC) != 0) {
    throw CommError("init: " + whom + " sent no descriptor. " + kRemedy);
  }
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(rights), sizeof(int));
  return Descriptor(descriptor);
}

/// One rank's part: it gives its descriptor to those that call it and receives theirs where it has
/// called.
class Exchange {
 public:
  Exchange(int listener, const std::string& token, int descriptor)
      : listener_(listener), descriptor_(descriptor) {
    std::memcpy(hello_.token.data(), token.data(), std::min(token.size(), hello_.token.size()));
  }

  /// Every rank's listener is open before its address is known, so a call succeeds at once, and
  /// nobody waits in a circle.
  void call(int world_rank, const std::string& address_text) {
    calls_.push_back({world_rank, open_socket(), Descriptor(-1), Descriptor(-1)});
    Call& made = calls_.back();
    const auto [address, length] = socket_address(address_text);
    const int socket = made.socket.get();
    if (connect(socket, reinterpret_cast<const sockaddr*>(&address), length) != 0) {
      throw PeerLostError("init: " + made.whom() + " cannot be reached on this host (" +
                          std::strerror(errno) + "). Read its log first.");
    }
    const ucred peer = peer_behind(socket);
    if (peer.uid != geteuid()) {
      throw CommError("init: " + made.whom() + " runs as user " + std::to_string(peer.uid) +
                      ", this rank as user " + std::to_string(geteuid()) +
                      ".\n  Start all ranks of a job as one user.");
    }
    made.process = open_process(peer.pid);
    if (send(socket, &hello_, sizeof(hello_), MSG_NOSIGNAL) != sizeof(hello_)) {
      if (errno == EPIPE || errno == ECONNRESET) throw PeerLostError(who_has_left(made.whom()));
      throw_system_error("send to " + made.whom(), kRemedy);
    }
  }

  bool done() const {
    return given_ == calls_.size() && std::ranges::none_of(calls_, &Call::is_awaited);
  }

  /// Do what can be done, and wait for it no longer than `slice`.
  ///
  /// A rank that ends closes its sockets: who was called and hangs up without giving its descriptor
  /// will not come. One that has given it has called everybody before.
  void go_on(std::chrono::milliseconds slice) {
    std::vector<pollfd> sockets{{listener_, POLLIN, 0}};
    for (const Caller& caller : callers_) sockets.push_back({caller.socket.get(), POLLIN, 0});
    std::vector<Call*> awaited;
    for (Call& call : calls_) {
      if (!call.is_awaited()) continue;
      awaited.push_back(&call);
      sockets.push_back({call.socket.get(), POLLIN, 0});
    }
    const int ready = poll(sockets.data(), sockets.size(), static_cast<int>(slice.count()));
    if (ready < 0 && errno != EINTR) throw_system_error("poll", kRemedy);
    if (ready <= 0) return;
    const std::size_t first_call = 1 + callers_.size();
    for (std::size_t i = 0; i < awaited.size(); ++i) {
      if (sockets[first_call + i].revents == 0) continue;
      Call& call = *awaited[i];
      call.received = receive_descriptor(call.socket.get(), call.whom());
      if (call.is_awaited()) throw PeerLostError(who_has_left(call.whom()));
    }
    for (std::size_t i = callers_.size(); i-- > 0;) {
      if (sockets[1 + i].revents != 0) listen_to(i);
    }
    if (sockets.front().revents != 0) accept_caller();
  }

  std::string who_is_missing() const {
    std::string whom;
    for (const Call& call : calls_) {
      if (call.is_awaited()) whom += (whom.empty() ? "" : ", ") + call.whom();
    }
    return "init: " + (whom.empty() ? "a rank of this host" : whom) +
           " did not come to exchange shared memory" +
           (strangers_ == 0 ? ""
                            : " (while " + std::to_string(strangers_) +
                                  " strangers called, who were sent away)") +
           ". Read its log first.";
  }

  /// What each of those that were called has given, in that order.
  std::vector<Descriptor> received() {
    std::vector<Descriptor> all;
    for (Call& call : calls_) all.push_back(std::move(call.received));
    return all;
  }

 private:
  /// A rank that was called.
  struct Call {
    int world_rank;
    Descriptor socket;
    Descriptor process;
    Descriptor received;

    bool is_awaited() const { return received.get() < 0; }
    std::string whom() const { return "rank " + std::to_string(world_rank); }
  };

  /// Why there will be no exchange. Who hangs up may do so because another one has ended, whom this
  /// rank waits for no more, or has not looked at yet.
  std::string who_has_left(const std::string& who_hung_up) const {
    std::vector<pollfd> processes;
    for (const Call& call : calls_) processes.push_back({call.process.get(), POLLIN, 0});
    poll(processes.data(), processes.size(), static_cast<int>(kTeardown.count()));
    std::string ended;
    for (std::size_t i = 0; i < calls_.size(); ++i) {
      if ((processes[i].revents & POLLIN) == 0) continue;
      ended += (ended.empty() ? "" : ", ") + calls_[i].whom();
    }
    const std::string what =
        ended.empty() ? who_hung_up + " has given up, or refuses this rank," : ended + " ended";
    return "init: " + what + " while the ranks of this host exchanged their shared memory. Read " +
           "its log first.";
  }

  void accept_caller() {
    Descriptor socket(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC));
    if (socket.get() < 0) {
      if (errno == ECONNABORTED || errno == EINTR) return;
      throw_system_error("accept", kRemedy);
    }
    if (peer_behind(socket.get()).uid == geteuid()) {
      callers_.push_back({std::move(socket)});
    } else {
      ++strangers_;
    }
  }

  void listen_to(std::size_t index) {
    Caller& caller = callers_[index];
    const Caller::Says says = caller.listen();
    if (says == Caller::Says::kMore) return;
    if (says == Caller::Says::kHello && caller.hello == hello_) {
      if (!send_descriptor(caller.socket.get(), descriptor_)) {
        throw PeerLostError(who_has_left("a rank of this host"));
      }
      ++given_;
    } else {
      ++strangers_;
    }
    callers_.erase(callers_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  const int listener_;
  const int descriptor_;
  Hello hello_{};
  std::vector<Call> calls_;
  std::vector<Caller> callers_;
  std::size_t given_ = 0;
  std::size_t strangers_ = 0;
};

}  // namespace

std::string random_hex(int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) {
    unsigned char byte = 0;
    if (getrandom(&byte, 1, 0) != 1) throw_system_error("getrandom", "");
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

bool Handover::is_address(std::string_view text) {
  return text.starts_with(kPrefix) && text.size() == kPrefix.size() + 2 * kNameBytes &&
         text.find_first_not_of("0123456789abcdef", kPrefix.size()) == std::string_view::npos;
}

Handover::Handover() : address_(std::string(kPrefix) + random_hex(kNameBytes)) {
  listener_ = open_socket().release();
  const auto [address, length] = socket_address(address_);
  if (bind(listener_, reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      listen(listener_, SOMAXCONN) != 0) {
    const int reason = errno;
    close(listener_);
    errno = reason;
    throw_system_error("bind to abstract socket " + address_, kRemedy);
  }
}

Handover::~Handover() { close(listener_); }

std::vector<Descriptor> Handover::exchange(int local_rank,
                                           const std::vector<std::string>& addresses,
                                           const std::vector<int>& world_ranks,
                                           const std::string& token, int descriptor,
                                           std::chrono::nanoseconds timeout,
                                           const InterruptCheck& check_interrupt) {
  const auto deadline = Clock::now() + timeout;
  Exchange part(listener_, token, descriptor);
  for (std::size_t peer = 0; peer < addresses.size(); ++peer) {
    if (static_cast<int>(peer) != local_rank) part.call(world_ranks[peer], addresses[peer]);
  }
  while (!part.done()) {
    if (check_interrupt) check_interrupt();
    if (Clock::now() >= deadline) throw PeerLostError(part.who_is_missing());
    part.go_on(kInterruptEvery);
  }
  std::vector<Descriptor> received = part.received();
  received.emplace(received.begin() + local_rank, -1);
  return received;
}

}  // namespace pycomm
