"""The collective that moves nothing."""

from typing import Literal, overload

from pycomm._core import Group
from pycomm.arguments import seconds
from pycomm.runtime import group_of
from pycomm.work import Work, nothing, outcome


@overload
def barrier(
    *, group: Group | None = ..., timeout_s: float | None = ..., async_op: Literal[False] = ...
) -> None: ...
@overload
def barrier(
    *, group: Group | None = ..., timeout_s: float | None = ..., async_op: Literal[True]
) -> Work[None]: ...
def barrier(
    *, group: Group | None = None, timeout_s: float | None = None, async_op: bool = False
) -> Work[None] | None:
    """Return once every rank has made this call.

    Args:
        group, timeout_s: as for ``all_reduce``.
        async_op: return at once with a ``Work`` whose ``wait()`` is the barrier.

    Raises:
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``.
    """
    group = group_of(group)
    if timeout_s is None and not async_op:
        group.barrier()
        return None
    work = group.barrier(timeout_s=seconds("barrier", timeout_s, group), async_op=async_op)
    return outcome(work, None, nothing)
