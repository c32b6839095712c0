#pragma once

#include <string>
#include <vector>

namespace pycomm {

/// Where the user's code made the call that is being carried out, "examples/train.py:31": the
/// innermost Python frame in a file that is not hidden. Null if there is none. The text lives to
/// the end of the process.
///
/// A place is written down once, however often it calls: 0.1 us after that. Under Python's lock.
const char* call_site();

/// From now on frames of files below these folders are passed over: they are not the user's.
void hide_frames_of(std::vector<std::string> folders);

}  // namespace pycomm
