#pragma once

namespace pycomm {

/// True in a process forked from one that uses pycomm (a data-loader worker): it has the parent's
/// mappings but none of its threads, so it must neither communicate nor free shared memory.
bool in_forked_child();

/// Start noticing forks; called before the first shared memory is made.
void watch_forks();

}  // namespace pycomm
