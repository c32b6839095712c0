#pragma once

namespace pycomm {

/// Keep this process's TCP connections open for `seconds` after its end, by a copy of it that only
/// sleeps. MPI ends a process whose peer's connection closes, with words and an exit code of its
/// own; this gives the launcher the time to end it first. Without memory for the copy nothing is
/// kept.
void linger(double seconds);

}  // namespace pycomm
