"""What MPI can still do after a process of it was lost: User-Level Failure Mitigation.

Open MPI 5 has it when its launcher was told so (``mpirun --with-ft ulfm``). mpi4py has the calls
everywhere, and elsewhere they do nothing or fail. Seen with Open MPI 5.0.11:

- ``Iagree`` gives its result, the same on all survivors, though it also raises that a process is
  gone. ``Ishrink`` fails, so the blocking ``Shrink`` is called, right after all have agreed.
- ``MPI_Finalize`` may wait for ever once a process is gone: see ``failure.note_loss``.
"""

from __future__ import annotations

import array
import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

from pycomm.errors import CommTimeoutError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


def is_on(environ: Mapping[str, str]) -> bool:
    """Whether the launcher leaves survivors alone, and MPI serves them."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes", "enabled")


def raise_errors(comm: MPI.Comm) -> None:
    """Errors of ``comm`` are exceptions from now on; as MPI has it, they end the process."""
    from mpi4py import MPI

    comm.Set_errhandler(MPI.ERRORS_RETURN)


def failed(comm: MPI.Intracomm) -> list[int]:
    """The ranks of ``comm`` that MPI has noticed to be gone."""
    from mpi4py import MPI

    group = comm.Get_failed()
    try:
        return MPI.Group.Translate_ranks(group, None, comm.Get_group())
    finally:
        group.Free()


def revoke(comm: MPI.Intracomm) -> None:
    """Whatever a rank does on ``comm`` fails from now on, but for ``agree`` and ``shrink``."""
    from mpi4py import MPI

    with contextlib.suppress(MPI.Exception):  # revoked by another one
        comm.Revoke()


def agree(comm: MPI.Intracomm, flags: int, *, timeout_s: float, check: Callable[[], object]) -> int:
    """Which bits of ``flags`` are set on all ranks that are alive: the same answer on all of them.

    Even if ranks are lost meanwhile, or ``comm`` is revoked.

    Args:
        timeout_s: for the others to come.
        check: called while waiting; what it raises ends the wait.

    Raises:
        CommTimeoutError: a rank that is alive did not come.
    """
    from mpi4py import MPI

    # MPI writes the result there; after a timeout it may do so at any time.
    result = array.array("i", [flags])
    request = comm.Iagree(result)
    deadline = time.monotonic() + timeout_s
    pause_s = 1e-5
    try:
        while not request.Test():
            check()
            if time.monotonic() > deadline:
                raise CommTimeoutError(
                    f"agree on rank {comm.Get_rank()} of {comm.Get_size()}: not all ranks that are "
                    f"alive came within {timeout_s:g} s; MPI does not say which."
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2e-3)
    except MPI.Exception as error:
        if error.Get_error_class() not in (MPI.ERR_PROC_FAILED, MPI.ERR_REVOKED):
            raise
    except BaseException:
        _abandoned.append((request, result))
        raise
    return result[0]


def shrink(comm: MPI.Intracomm, *, timeout_s: float) -> MPI.Intracomm:
    """A communicator of those of ``comm`` that are alive, in their order. Collective over them.

    Raises:
        CommTimeoutError: it took too long.
    """
    shrunk = cast("MPI.Intracomm", within(timeout_s, "shrink", comm.Shrink))
    raise_errors(shrunk)
    return shrunk


def within(timeout_s: float, call: str, action: Callable[[], T]) -> T:
    """What ``action`` returns, a call of MPI's that only blocks; Ctrl-C ends the wait for it.

    Raises:
        CommTimeoutError: it took too long. It may still go on: end the process soon.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"pycomm {call}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise CommTimeoutError(f"{call}: MPI did not return within {timeout_s:g} s.")
    if errors:
        raise errors[0]
    return results[0]


# What MPI may still write to.
_abandoned: list[tuple[MPI.Request, array.array[int]]] = []
