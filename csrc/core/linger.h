#pragma once

namespace pycomm {

/// Keep this process's TCP connections open for `seconds` after its end, by a copy of it that only
/// sleeps. MPI ends a process whose peer's connection closes, with words and an exit code of its
/// own; this gives the launcher the time to end it first. The copy shares the process's memory,
/// which is free again when it has gone. If it cannot be made nothing is kept, and nobody is told.
void linger(double seconds) noexcept;

}  // namespace pycomm
