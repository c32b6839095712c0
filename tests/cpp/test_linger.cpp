// linger(): connections outlive their process for a while, and nothing else does.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "check.h"
#include "core/linger.h"

namespace {

/// Both ends of a TCP connection.
std::array<int, 2> tcp_pair() {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  CHECK_EQUAL(bind(listener, reinterpret_cast<sockaddr*>(&address), size), 0);
  CHECK_EQUAL(listen(listener, 1), 0);
  CHECK_EQUAL(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const int connected = socket(AF_INET, SOCK_STREAM, 0);
  CHECK_EQUAL(connect(connected, reinterpret_cast<sockaddr*>(&address), size), 0);
  const int accepted = accept(listener, nullptr, nullptr);
  CHECK(accepted >= 0);
  close(listener);
  return {accepted, connected};
}

}  // namespace

TEST(a_connection_is_closed_later_than_its_process_and_a_pipe_is_not) {
  const auto [mine, theirs] = tcp_pair();
  std::array<int, 2> pipe_ends;
  CHECK_EQUAL(pipe(pipe_ends.data()), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(mine);
    pycomm::linger(3.0);
    _exit(7);
  }
  close(theirs);
  close(pipe_ends[1]);
  int status = 0;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(WEXITSTATUS(status), 7);  // at once: it does not wait for its copy
  char byte = 0;
  CHECK_EQUAL(read(pipe_ends[0], &byte, 1), 0);
  CHECK_EQUAL(recv(mine, &byte, 1, MSG_DONTWAIT), -1);
  CHECK_EQUAL(errno, EAGAIN);
  CHECK_EQUAL(recv(mine, &byte, 1, 0), 0);
  close(mine);
  close(pipe_ends[0]);
}
