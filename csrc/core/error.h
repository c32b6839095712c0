#pragma once

#include <stdexcept>
#include <string>

namespace pycomm {

/// Root of everything pycomm raises; the Python classes of the same names mirror this tree.
class CommError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller's mistake, found before anything was sent: the group stays usable.
class InvalidArgumentError : public CommError {
 public:
  using CommError::CommError;
};

/// Ranks made different calls at the same position. The group is finished.
class MismatchError : public CommError {
 public:
  using CommError::CommError;
};

/// A peer did not come in time. The group is finished.
class CommTimeoutError : public CommError {
 public:
  using CommError::CommError;
};

/// What to do when a rank did not come to a call in time.
inline constexpr const char* kTimeoutRemedy =
    "Read that rank's log first; if it is only slow, raise the timeout: timeout_s of the call or "
    "of init, or PYCOMM_TIMEOUT_S; timeout of init_process_group or new_group.";

/// A peer's process is gone or has given up. The group is finished.
class PeerLostError : public CommError {
 public:
  using CommError::CommError;
};

/// What is said behind the name of a rank whose process has ended in the job.
inline constexpr const char* kIsGone =
    " is gone, its process ended without leaving the job (killed, crashed or out of memory).\n  "
    "Read that rank's log and the kernel's (dmesg).";

}  // namespace pycomm
