#pragma once

#include <functional>

namespace pycomm {

/// Called now and then while a thread waits, without any lock held; throws to give up (Ctrl-C).
using InterruptCheck = std::function<void()>;

}  // namespace pycomm
