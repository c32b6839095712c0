#pragma once

namespace pycomm {

/// Tells the processor that this thread spins: it leaves the loop without a pipeline flush and
/// meanwhile leaves its units to a sibling thread. On x86 it takes 40 to 140 cycles.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace pycomm
