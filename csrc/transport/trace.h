#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/record.h"
#include "transport/process_page.h"

namespace pycomm {

/// What the flight recorder of one rank holds.
struct RankTrace {
  Identity identity;
  /// Its process has died.
  bool gone = false;
  /// Its process has called shutdown().
  bool left = false;
  std::vector<Record> records;  // by number
};

/// The recorders of the ranks of one host at one moment.
struct Trace {
  std::int64_t now_ns = 0;  // of that host's steady clock
  /// The error for which it was taken; empty: none.
  std::string reason;
  std::vector<RankTrace> ranks;
};

/// Read a page that its process, and others, may be writing.
RankTrace read_page(const ProcessPage& page);

/// Read the page at the beginning of the arena behind a descriptor of another process.
/// @param path  "/proc/PID/fd/N".
/// @throws CommError  it is no arena, or one of another version of pycomm.
RankTrace read_page_at(const std::string& path);

/// Write a file that read_trace() reads, in place of one that may be there, as a whole or not at
/// all. Only its owner can read it.
/// @throws CommError  naming the system call.
void write_trace(const std::string& path, const Trace& trace);

/// @throws CommError  it is not such a file, or not a whole one.
Trace read_trace(const std::string& path);

}  // namespace pycomm
