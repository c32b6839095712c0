#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string_view>

#include "core/recorder.h"
#include "transport/doorbell.h"
#include "transport/liveness.h"
#include "transport/notice.h"
#include "transport/standing.h"

namespace pycomm {

/// Who a process is, for whoever looks at its page from outside. Plain bytes.
struct Identity {
  /// What every page begins with, and no page of another version of this file.
  static constexpr std::uint64_t kMagic = 0x3354454741504350;  // "PCPAGET3"

  std::int32_t rank = -1;
  std::int32_t size = 0;
  std::int32_t host = 0;  // its index among the hosts of the job
  std::int32_t process = 0;
  /// In which namespace that is its number; 0: unknown.
  std::uint64_t process_namespace = 0;
  /// What to add to the steady clock for the time of day, nanoseconds.
  std::int64_t to_time_of_day_ns = 0;
  // Cut off, end at the first zero.
  std::array<char, 64> host_name{};
  std::array<char, 40> job{};

  /// Whether this process knows that one by the same number. Containers may share a network, so
  /// that they count as one host, and not their processes.
  bool shares_process_numbers() const;

  static Identity of_this_process(int rank, int size, int host, std::string_view host_name,
                                  std::string_view job);
};

/// How to learn what a process is doing: it writes the stacks of its threads to the file behind
/// `descriptor` when it gets `signal`. 0: it does not.
struct StackOffer {
  std::atomic<std::int32_t> signal{0};
  std::atomic<std::int32_t> descriptor{-1};
};

/// What one process shows the others of its host. It lies at the beginning of its arena.
struct ProcessPage {
  /// Identity::kMagic, once the identity can be read.
  std::atomic<std::uint64_t> magic{0};
  Identity identity;
  StackOffer stacks;
  alignas(64) Doorbell doorbell;
  alignas(64) LifeWord life;
  /// Set when the rank has called shutdown(): it starts nothing any more.
  std::atomic<bool> leaving{false};
  /// When the progress thread was last seen at work, in ns of the steady clock, which is the same
  /// on all of a host. With several hosts only; 0: not yet.
  std::atomic<std::int64_t> pulse_ns{0};
  /// It has heard of every other host, as who speaks for this one.
  std::atomic<bool> has_heard_all{false};
  /// While its calls do not end.
  StandingBoard standing;
  Verdict verdict;
  /// Posted on the first local rank's page when a rank ends the whole job.
  alignas(64) Notice notice;
  alignas(64) Recorder recorder;
};

}  // namespace pycomm
