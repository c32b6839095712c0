#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "transport/standing.h"

namespace pycomm {

/// Why calls that ranks wait in can never end.
struct Fault {
  struct Concerned {
    int rank;  // in the world
    int tag;   // of the group in which it waits
  };
  std::string text;  // the same on whoever finds it
  std::vector<Concerned> concerned;
};

/// Looks for a fault among what ranks show: two that made different calls at one position, or calls
/// that wait for each other in a circle.
///
/// Call (G, n), number n of group G, waits for every member that has not issued it. Such a member
/// will not while the thread that issues its calls of G waits in a call itself, which is the next
/// link of the circle:
///
///   rank 0 in (A, 1) ---> rank 2, whose issuer of A waits in (B, 1) ---> rank 0, whose issuer of B
///   waits in (A, 1)
///
/// No moment must be common to the standings, and none need be fresh. Let p wait in O_p and have
/// issued less than O_q at the moment of its standing: before it issues O_q, O_p has to end. So
/// O_q, which needs p, ends after O_p. Around a circle each call ends after itself: none ever does.
/// (Unless one ends by an error: look twice.)
///
/// It rests on one assumption: the thread that issued a group's last operation, or has made the
/// group, issues the next one too. A group that a second thread is about to use for the first time
/// can look like part of a circle, where other ranks use one thread for what this rank uses two.
///
/// Neither operations that nobody waits for nor ranks that compute are part of a circle, nor are
/// operations behind others in a queue: what counts is the one that is under way.
std::optional<Fault> find_fault(std::span<const Standing> standings);

}  // namespace pycomm
