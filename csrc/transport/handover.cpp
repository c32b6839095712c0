#include "transport/handover.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/system_error.h"

namespace pycomm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kRemedy = "Unix sockets must work between the ranks of a host.";

/// Owns a descriptor, or none (-1).
class Descriptor {
 public:
  explicit Descriptor(int descriptor) : descriptor_(descriptor) {}
  Descriptor(Descriptor&& other) noexcept : descriptor_(other.release()) {}
  ~Descriptor() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  int get() const { return descriptor_; }
  int release() { return std::exchange(descriptor_, -1); }

 private:
  int descriptor_;
};

/// The abstract namespace: the first byte of the path is 0, the length ends the name.
std::pair<sockaddr_un, socklen_t> socket_address(const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

/// What opens a hand-over: the proof that the caller belongs to this job.
struct Hello {
  std::array<char, 32> token;
};

Descriptor open_socket() {
  Descriptor opened(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (opened.get() < 0) throw_system_error("socket(AF_UNIX)", kRemedy);
  return opened;
}

void check_same_user(int socket) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) {
    throw_system_error("getsockopt(SO_PEERCRED)", kRemedy);
  }
  if (peer.uid != geteuid()) {
    throw CommError("process " + std::to_string(peer.pid) + " of user " + std::to_string(peer.uid) +
                    " asked for the shared memory of user " + std::to_string(geteuid()) +
                    ". All ranks of a job must run as one user.");
  }
}

/// Wait until `socket` can be read.
void await_readable(int socket, Clock::time_point deadline, const std::string& whom) {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry{socket, POLLIN, 0};
    const int ready = left > 0 ? poll(&entry, 1, static_cast<int>(left)) : 0;
    if (ready > 0) return;
    if (ready == 0) {
      throw PeerLostError("init: " + whom +
                          " did not come to exchange shared memory. Read its log first.");
    }
    if (errno != EINTR) throw_system_error("poll", kRemedy);
  }
}

Hello receive_hello(int socket) {
  Hello hello{};
  if (recv(socket, &hello, sizeof(hello), MSG_WAITALL) != sizeof(hello)) {
    throw PeerLostError("init: a rank of this host ended while it exchanged shared memory.");
  }
  return hello;
}

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

void send_descriptor(int socket, int descriptor) {
  DescriptorMessage message;
  cmsghdr* rights = CMSG_FIRSTHDR(&message.header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(rights), &descriptor, sizeof(int));
  if (sendmsg(socket, &message.header, MSG_NOSIGNAL) != 1) throw_system_error("sendmsg", kRemedy);
}

Descriptor receive_descriptor(int socket, const std::string& whom) {
  DescriptorMessage message;
  if (recvmsg(socket, &message.header, MSG_CMSG_CLOEXEC) != 1) {
    throw PeerLostError("init: " + whom + " ended, or refused to hand over its shared memory.");
  }
  const cmsghdr* rights = CMSG_FIRSTHDR(&message.header);
  if (rights == nullptr || rights->cmsg_type != SCM_RIGHTS) {
    throw CommError("init: " + whom + " sent no descriptor. " + kRemedy);
  }
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(rights), sizeof(int));
  return Descriptor(descriptor);
}

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

Handover::Handover() : address_("pycomm-" + random_hex(16)) {
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

std::vector<int> Handover::exchange(int local_rank, const std::vector<std::string>& addresses,
                                    const std::vector<int>& world_ranks, const std::string& token,
                                    int descriptor, std::chrono::nanoseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  const auto whom = [&](std::size_t peer) { return "rank " + std::to_string(world_ranks[peer]); };
  Hello hello{};
  std::memcpy(hello.token.data(), token.data(), std::min(token.size(), hello.token.size()));

  // Everybody's listener is open before its address is known, so every connect succeeds at once
  // and nobody waits in a circle.
  std::vector<Descriptor> calls;
  for (std::size_t peer = 0; peer < addresses.size(); ++peer) {
    calls.push_back(open_socket());
    if (static_cast<int>(peer) == local_rank) continue;
    const auto [address, length] = socket_address(addresses[peer]);
    if (connect(calls[peer].get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
      throw PeerLostError("init: " + whom(peer) + " cannot be reached on this host (" +
                          std::strerror(errno) + "). Read its log first.");
    }
    check_same_user(calls[peer].get());
    if (send(calls[peer].get(), &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello)) {
      throw_system_error("send to " + whom(peer), kRemedy);
    }
  }
  for (std::size_t served = 1; served < addresses.size(); ++served) {
    await_readable(listener_, deadline, "a rank of this host");
    const Descriptor caller(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC));
    if (caller.get() < 0) throw_system_error("accept", kRemedy);
    check_same_user(caller.get());
    await_readable(caller.get(), deadline, "a rank of this host");
    if (receive_hello(caller.get()).token != hello.token) {
      throw CommError("init: a process that does not belong to this job asked for its memory.");
    }
    send_descriptor(caller.get(), descriptor);
  }
  std::vector<Descriptor> received;
  for (std::size_t peer = 0; peer < addresses.size(); ++peer) {
    if (static_cast<int>(peer) == local_rank) {
      received.emplace_back(-1);
      continue;
    }
    await_readable(calls[peer].get(), deadline, whom(peer));
    received.push_back(receive_descriptor(calls[peer].get(), whom(peer)));
  }
  std::vector<int> descriptors;
  for (Descriptor& descriptor_of_peer : received)
    descriptors.push_back(descriptor_of_peer.release());
  return descriptors;
}

}  // namespace pycomm
