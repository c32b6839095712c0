#pragma once

#include <cstddef>
#include <string>

#include "transport/process_page.h"

namespace pycomm {

/// What can be learned of a rank of this host that does not come, for an error:
///
///   rank 2 (process 4711, sleeping) last did all_reduce of 4 float32, SUM (call #40 of world) at
///   train.py:31, which ended 12.3 s ago, and is in no call of pycomm
///
/// Costs a system call or two and a look at all it has recorded; never waits.
std::string describe_whereabouts(const ProcessPage& page, const std::string& name);

/// Rank in the world whose part of a message the rank has been waiting for longest; -1: nobody's.
int whom_it_waits_for(const ProcessPage& page);

/// The Python stacks of the rank's threads, the main thread's first, at most `most_bytes` of them,
/// each line indented by four; or, in such a line, why there are none.
///
/// The process is sent a signal whose handler needs neither Python's lock nor the thread that
/// hangs. Waits for what it writes, at most a second.
std::string stacks_of(const ProcessPage& page, std::size_t most_bytes);

}  // namespace pycomm
