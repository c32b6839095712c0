"""Joining and leaving the job, and this rank's place in it."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pycomm import _core, failure, tensor_calls, ulfm
from pycomm.connection import Settings, connect, host_name, read_settings
from pycomm.errors import InvalidArgumentError, NotInitializedError
from pycomm.launch import detect
from pycomm.rendezvous import Rendezvous, meet, through_comm

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclasses.dataclass(frozen=True)
class _Session:
    world: _core.World
    job: str
    group: _core.Group  # world.group, at hand: every call without a group asks for it
    comm: MPI.Intracomm | None  # as given to init()
    met_on: MPI.Intracomm | None  # comm, or what the launcher gave; None without MPI
    timeout_s: float
    leave_timeout_s: float  # how long shutdown() waits for the others; 0: timeout_s


# An error that names the place of a call names the user's, not one of these folders.
_LIBRARIES = [os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__)]

_session: _Session | None = None
_sessions_begun = 0
_forked_from: _Session | None = None  # in a forked child: its parent's session


def init(*, comm: MPI.Intracomm | None = None, timeout_s: float | None = None) -> None:
    """Join the other ranks. Every rank calls it once, before anything else of pycomm.

    The environment says who started this process (see ``pycomm.launch``): the ranks then meet
    through MPI, under torchrun through torch's TCPStore, or not at all in a world of one. From
    here to ``shutdown()`` an uncaught exception on one rank ends the job (see ``pycomm.failure``).

    A second call does nothing, as long as it does not ask for something else.

    Args:
        comm: an mpi4py communicator whose processes are the ranks, in its order. The launcher is
            not asked then. MPI calls of your own beside pycomm's need MPI's thread level
            MULTIPLE, which is mpi4py's default.
        timeout_s: the default for every collective, seconds; ``PYCOMM_TIMEOUT_S`` or 600 if None.

    Raises:
        InvalidArgumentError: the environment or an argument makes no sense.
        MismatchError: ranks disagree about ``timeout_s``.
        CommTimeoutError: not all ranks came.
        CommError: MPI is missing or mixed up, or ranks of several hosts have no way to talk.
    """
    if _forked_from is not None:
        raise NotInitializedError(_fork_problem("init", _forked_from))
    if _session is not None:
        _refuse_second_init(_session, comm, timeout_s)
        return
    launch = detect(os.environ)
    name = host_name(os.environ)
    if comm is None and launch.world_size != 1:
        # A rank that fails from here on, by an argument of its own, would otherwise wait in
        # MPI_Finalize (mpi4py may have been imported) for those that wait for it here. Nobody can
        # be told yet, so it just leaves, and the launcher notices.
        size = launch.world_size or launch.rank + 1
        failure.watch(failure.Member(launch.rank, size, name, lambda reason: True))
    settings = read_settings(timeout_s, os.environ)
    _begin_session()
    if comm is None:
        rendezvous = meet(launch, os.environ, attempt=_sessions_begun, timeout_s=settings.timeout_s)
    else:
        rendezvous = through_comm(comm, timeout_s=settings.timeout_s)
    _enter(rendezvous, comm, settings)


def init_through(rendezvous: Rendezvous, *, timeout_s: float, leave_timeout_s: float = 0.0) -> None:
    """``init()`` of ranks that have met by themselves, in a store of torch's, say.

    Args:
        rendezvous: where they have met.
        timeout_s: as for ``init``.
        leave_timeout_s: how long ``shutdown()`` waits for ranks that are alive; ``timeout_s`` if 0.

    Raises:
        As ``init()``; InvalidArgumentError too if this process has joined already.
    """
    if _forked_from is not None:
        raise NotInitializedError(_fork_problem("init", _forked_from))
    if _session is not None:
        raise InvalidArgumentError("init: this process has joined a job. Call shutdown() first.")
    settings = read_settings(timeout_s, os.environ)
    _begin_session()
    _enter(rendezvous, None, settings, leave_timeout_s)


def shutdown() -> None:
    """Leave the job, together with all ranks. Does nothing when there is none to leave.

    Called by itself when the process exits normally. ``init()`` may be called again afterwards.
    While an exception is being handled (``finally: shutdown()``) ranks that wait for this one are
    told of it.

    Raises:
        MismatchError: another rank still calls something; it raises there as well.
        CommError: what an asynchronous call failed with, if no call has raised an error since.
    """
    global _session
    session = _session
    if session is None:
        return
    if lost_ranks():
        failure.note_loss()
    try:
        session.world.close(timeout_s=session.leave_timeout_s, failure=failure.being_handled())
    finally:
        _session = None
        tensor_calls.set_world(None)
    failure.unwatch()


def job() -> str | None:
    """What all ranks of the job, and nobody else, call it; None outside of one."""
    return None if _session is None else _session.job


def make_group(
    ranks: Sequence[int], all_gather_bytes: Callable[[bytes], list[bytes]], timeout_s: float
) -> _core.Group:
    """A group of these ranks of the job, which alone take part; see ``_core.World.make_group``."""
    world_group("make_group")
    assert _session is not None
    return _session.world.make_group(ranks, all_gather_bytes, timeout_s=timeout_s)


def check_present(ranks: Sequence[int], call: str) -> None:
    """Raise what ends a call if one of these ranks is gone or leaves; see ``_core.World``."""
    if _session is not None:
        _session.world.check_present(ranks, call)


def lost_ranks() -> list[int]:
    """The ranks whose processes are known to have ended without leaving the job, as if killed.

    Those of this host are known at once, those of others when they have told, or have been silent
    for ``PYCOMM_HOST_TIMEOUT_S``, or MPI has noticed, which takes ULFM.
    """
    if _session is None:
        return []
    lost = set(_session.world.lost())
    if _session.met_on is not None and len(_session.group.hosts) > 1 and ulfm.is_on(os.environ):
        lost.update(ulfm.failed(_session.met_on))
    return sorted(lost)


def withdraw() -> None:
    """Make no more calls before ``shutdown()``, which then waits for nobody.

    Ranks that wait for this one, in any group, raise a MismatchError after a second.
    """
    if _session is not None:
        _session.world.withdraw()


def met_on() -> MPI.Intracomm | None:
    """The communicator on which the ranks have met; None without MPI."""
    return None if _session is None else _session.met_on


def default_timeout_s() -> float:
    """Of calls that name none."""
    world_group("default_timeout_s")
    assert _session is not None
    return _session.timeout_s


def is_initialized() -> bool:
    """Whether this process is a rank: between ``init()`` and ``shutdown()``."""
    return _session is not None


def rank() -> int:
    """This process's index among all ranks."""
    return world_group("rank").rank


def size() -> int:
    """The number of ranks."""
    return world_group("size").size


def hosts() -> list[list[int]]:
    """The ranks of each host, in rank order; hosts in the order of their lowest rank."""
    return world_group("hosts").hosts


def local_rank() -> int:
    """This process's index among the ranks of its host."""
    return _own_host("local_rank").index(rank())


def local_size() -> int:
    """The number of ranks on this host."""
    return len(_own_host("local_size"))


def host_rank() -> int:
    """The index of this host among all hosts."""
    return hosts().index(_own_host("host_rank"))


def host_size() -> int:
    """The number of hosts."""
    return len(world_group("host_size").hosts)


def world_group(call: str | None = None) -> _core.Group:
    """The group of all ranks.

    Args:
        call: for the error, what needs it; the calling function if None.

    Raises:
        NotInitializedError: before ``init()``, after ``shutdown()``, or in a forked child.
    """
    if _session is not None:
        return _session.group
    name = call or sys._getframe(1).f_code.co_name
    if _forked_from is not None:
        raise NotInitializedError(_fork_problem(name, _forked_from))
    if _sessions_begun:
        raise NotInitializedError(
            f"{name}: called after shutdown(), or after an init() that failed.\n"
            "  call pycomm.init() first to join again."
        )
    raise NotInitializedError(
        f"{name}: this process has not joined the job.\n  call pycomm.init() first."
    )


def group_of(group: _core.Group | None, call: str | None = None) -> _core.Group:
    """The group that a call means: the world if it names none.

    Args:
        call: for the error, what was given the group; the calling function if None.

    Raises:
        InvalidArgumentError: it is something else.
        NotInitializedError: as ``world_group``.
    """
    if isinstance(group, _core.Group):
        return group
    call = call or sys._getframe(1).f_code.co_name
    if group is None:
        return world_group(call)
    where = f" on rank {_session.group.rank}" if _session is not None else ""
    raise InvalidArgumentError(
        f"{call}{where}: group is {group!r}.\n"
        "  Pass what new_group(), split() or a Mesh returned, or None for the world."
    )


def _begin_session() -> None:
    global _sessions_begun
    if _sessions_begun == 0:
        atexit.register(_leave_at_exit)
        os.register_at_fork(after_in_child=_disown)
    _sessions_begun += 1


def _enter(
    rendezvous: Rendezvous,
    comm: MPI.Intracomm | None,
    settings: Settings,
    leave_timeout_s: float = 0.0,
) -> None:
    """The ranks have met: from here on this process is one of them."""
    global _session
    _core.hide_frames_of(_LIBRARIES)
    connection = connect(rendezvous, settings)
    world = connection.world
    if rendezvous.size > 1:
        name = host_name(os.environ)
        member = failure.Member(rendezvous.rank, rendezvous.size, name, world.abort)
        if rendezvous.comm is not None and len(world.group.hosts) > 1:
            leave = functools.partial(failure.abort_mpi, rendezvous.comm)
            spared = ulfm.is_on(os.environ)
            member = dataclasses.replace(member, leave=leave, spared=spared)
        failure.watch(member)
        if rendezvous.comm is not None and rendezvous.rank < 2:
            failure.warn_at_end(member, settings.warn_after_s)
        if rendezvous.comm is not None and ulfm.is_on(os.environ):
            failure.bound_finalising(member, settings.timeout_s)
    _session = _Session(
        world,
        connection.job,
        world.group,
        comm,
        rendezvous.comm,
        settings.timeout_s,
        leave_timeout_s,
    )
    tensor_calls.set_world(_session.group)


def _refuse_second_init(
    session: _Session, comm: MPI.Intracomm | None, timeout_s: float | None
) -> None:
    remedy = "  Call shutdown() before an init() that asks for something else."
    if comm is not None and comm != session.comm:
        raise InvalidArgumentError(f"init: called before with another comm.\n{remedy}")
    if timeout_s is not None and timeout_s != session.timeout_s:
        raise InvalidArgumentError(
            f"init: called before with timeout_s={session.timeout_s:g}, now with {timeout_s!r}.\n"
            f"{remedy}"
        )


def _fork_problem(call: str, session: _Session) -> str:
    return (
        f"{call}: process {os.getpid()} was forked from rank {session.group.rank} and is "
        "not a rank itself.\n"
        "  Data-loader workers and other children cannot use pycomm; start ranks with the launcher."
    )


def _own_host(call: str) -> list[int]:
    group = world_group(call)
    return next(ranks for ranks in group.hosts if group.rank in ranks)


def _disown() -> None:
    """In a forked child: the session, kept alive, is the parent's."""
    global _session, _forked_from
    _session, _forked_from = None, _session or _forked_from
    tensor_calls.set_world(None)


def _leave_at_exit() -> None:
    try:
        shutdown()
    except BaseException as error:
        failure.end_job_at_exit(error)
        raise
    finally:
        failure.leave_at_end()
