#pragma once

#include <cerrno>
#include <cstring>
#include <string>

#include "core/error.h"

namespace pycomm {

/// A failed system call as an error: "memfd_create: Cannot allocate memory. <remedy>".
[[noreturn]] inline void throw_system_error(const std::string& call, const std::string& remedy) {
  throw CommError(call + ": " + std::strerror(errno) + ". " + remedy);
}

}  // namespace pycomm
