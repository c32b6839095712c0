"""Which processes are the ranks, after some were lost and with others that come."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from pycomm import runtime, ulfm
from pycomm.connection import host_key
from pycomm.errors import CommError
from pycomm.rendezvous import through_comm

if TYPE_CHECKING:
    from mpi4py import MPI

# On each communicator its ranks agree on one thing at a time, in this order: that all have joined
# (of communicators that we made), that the ranks may grow in number, that they have; and at last
# either that all are done, or not, because some have noticed a loss. So that nobody takes another's
# answer for its own, a rank that leaves this order always gives 0, and whoever gets 0 follows.

_SHRINK_S = 60.0


class TooFewError(Exception):
    """The ranks that are left must not go on."""


class CutOffError(TooFewError):
    """Others may be alive, cannot be reached, and go on."""


class Members(NamedTuple):
    """Those that are to join."""

    comm: MPI.Intracomm
    hosts: list[list[int]]
    """The ranks of ``comm`` on each host."""


def can_go_on() -> bool:
    """Whether MPI can, and the launcher lets it, go on without a lost rank."""
    return runtime.met_on() is not None and ulfm.is_on(os.environ)


def all_agree(mine: bool) -> bool:
    """Whether ``mine`` is true on all ranks that are alive: the same answer on all of them.

    Raises:
        PeerLostError: an exception on a rank has ended the job.
        CommTimeoutError: a rank that is alive did not come.
    """
    return _agree(_comm(), mine)


def leave_the_lost(min_ranks: int) -> None:
    """From here on those that are alive are the ranks, in their order. All of them call it.

    Raises:
        TooFewError: they are fewer than ``min_ranks``.
        CutOffError: there may be others that are alive, on hosts that cannot be reached, and more.
        PeerLostError: an exception on a rank has ended the job.
        CommTimeoutError: a rank that is alive did not come.
    """
    members = Members(_comm(), runtime.hosts())
    survivors = ulfm.shrink(members.comm, timeout_s=_SHRINK_S)
    _check_job_goes_on()
    form(_enough(members, survivors, min_ranks), min_ranks)


def members_of(comm: MPI.Intracomm, timeout_s: float) -> Members:
    """All processes of ``comm``, and where they are. Collective.

    Raises:
        CommError: some are lost, or did not come.
    """
    keys = through_comm(comm, timeout_s=timeout_s).all_gather_bytes(host_key(os.environ).encode())
    by_key: dict[bytes, list[int]] = {}
    for rank, key in enumerate(keys):
        by_key.setdefault(key, []).append(rank)
    return Members(comm, list(by_key.values()))


def form(members: Members, min_ranks: int) -> None:
    """They join, without those that are lost meanwhile. All of them call it.

    Raises:
        TooFewError, CutOffError, CommTimeoutError: as ``leave_the_lost``.
        CommError: they cannot join, though nobody is lost.
    """
    # With the same deadline as before; recruits read theirs as the others did.
    timeout_s = runtime.default_timeout_s() if runtime.is_initialized() else None
    attempts_in_vain = 0
    while (problem := _join(members.comm, timeout_s)) is not None:
        survivors = ulfm.shrink(members.comm, timeout_s=_SHRINK_S)
        left = _enough(members, survivors, min_ranks)
        attempts_in_vain += survivors.Get_size() == members.comm.Get_size()  # nobody is to blame
        if attempts_in_vain > 2:
            raise CommError(f"elastic.run: the ranks that are left cannot meet: {problem}")
        members = left


def _join(comm: MPI.Intracomm, timeout_s: float | None) -> str | None:
    """Join the ranks of ``comm``. None, or why not, if one of them could not."""
    try:
        runtime.shutdown()
    except CommError:  # of a world that is over; it has left all the same
        assert not runtime.is_initialized()
    problem = ""
    try:
        runtime.init(comm=comm, timeout_s=timeout_s)
    except CommError as error:
        problem = str(error)
        ulfm.revoke(comm)  # for those that wait for this rank
    if _agree(comm, not problem):
        return None
    runtime.withdraw()
    return problem or "another rank could not"


def _agree(comm: MPI.Intracomm, mine: bool) -> bool:
    ulfm.raise_errors(comm)
    timeout_s = runtime.default_timeout_s() if runtime.is_initialized() else _SHRINK_S
    return ulfm.agree(comm, int(mine), timeout_s=timeout_s, check=_check_job_goes_on) == 1


def _comm() -> MPI.Intracomm:
    comm = runtime.met_on()
    assert comm is not None
    return comm


def _check_job_goes_on() -> None:
    runtime.check_present([], "elastic.run")


def _enough(before: Members, survivors: MPI.Intracomm, min_ranks: int) -> Members:
    """Those of ``before`` that are left, if they may go on.

    Raises:
        TooFewError, CutOffError: they may not.
    """
    from mpi4py import MPI

    were, left = before.comm.Get_group(), survivors.Get_group()
    ranks_now = MPI.Group.Translate_ranks(were, None, left)
    has_first = ranks_now[0] != MPI.UNDEFINED
    problem = too_few(left.Get_size(), were.Get_size(), len(before.hosts), has_first, min_ranks)
    if problem:
        raise (TooFewError if left.Get_size() < min_ranks else CutOffError)(problem)
    here = [[ranks_now[rank] for rank in ranks] for ranks in before.hosts]
    hosts = [[rank for rank in ranks if rank != MPI.UNDEFINED] for ranks in here]
    return Members(survivors, [ranks for ranks in hosts if ranks])


def too_few(left: int, were: int, hosts: int, has_first: bool, min_ranks: int) -> str:
    """Why ``left`` of ``were`` ranks must not go on, or "".

    On one host a process is there or it is not. Between hosts a cut cable makes two halves, each of
    which takes the other for lost: one alone may go on, the larger, or the one that has rank 0.

    Args:
        hosts: how many they were on.
        has_first: whether rank 0 is among those that are left.
    """
    if left < min_ranks:
        return f"{left} of {were} ranks are left, and min_ranks is {min_ranks}."
    if hosts == 1 or 2 * left > were or (2 * left == were and has_first):
        return ""
    return (
        f"{left} of {were} ranks are left: the others may be alive, on hosts that cannot be "
        "reached from here, and go on."
    )
