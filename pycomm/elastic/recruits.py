"""Processes that are started in place of lost ranks, and how they become ranks.

MPI_Comm_spawn takes as long as the new process takes to start and to import torch. So it runs in a
thread of its own, on a communicator of its own, while the others train; a commit takes the recruits
in when all of them wait to be taken in.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from pycomm import failure, launch, runtime, ulfm
from pycomm.elastic import membership
from pycomm.elastic.membership import Members
from pycomm.errors import CommError, CommTimeoutError, InvalidArgumentError
from pycomm_launch.recruit import command

if TYPE_CHECKING:
    from mpi4py import MPI

_READY, _ORDER = 7301, 7302  # tags
_JOIN, _LEAVE = b"join", b"away"
_MERGE_S = 60.0
_START_S = 120.0  # for a process to start, when everybody else has finished
_ORDER_S = 5.0
_WAIT_S = 600.0  # of recruits and ranks for each other


class Recruits:
    """Those that were started last. Their ranks' side."""

    def __init__(self) -> None:
        self._attempt: _Attempt | None = None
        self._dismissed: list[_Attempt] = []  # MPI may still write to what they hold

    @property
    def count(self) -> int:
        """Of those that are started, or being started, and not yet taken in."""
        return 0 if self._attempt is None else self._attempt.count

    @property
    def unstarted(self) -> int:
        """Of them, those that MPI was not even asked to start."""
        return self.count if self._attempt is not None and self._attempt.is_in_vain else 0

    @property
    def problem(self) -> str:
        """Why they will not come, if so."""
        return "" if self._attempt is None else self._attempt.problem

    def start(self, comm: MPI.Intracomm, count: int) -> None:
        """Begin to start ``count`` more of what this process runs. Collective; returns at once.

        Raises:
            PeerLostError: an exception on a rank has ended the job.
            CommTimeoutError: a rank that is alive did not come.
        """
        assert self._attempt is None
        self._attempt = _Attempt(count)
        self._attempt.begin(comm)

    def are_ready(self, rank: int) -> bool:
        """Whether they wait to be taken in, as far as this rank, which is ``rank``, knows."""
        return self._attempt is not None and self._attempt.is_ready(rank)

    def merged(self, rank: int) -> Members | None:
        """The ranks and behind them the recruits; None if that fails. Collective over the ranks."""
        from mpi4py import MPI

        attempt = self._attempt
        assert attempt is not None and attempt.found is not None
        try:
            if rank == 0:
                attempt.tell(_JOIN)
            merged = _merged(attempt.found, recruits=False)
        except (MPI.Exception, CommError):
            return None
        self._forget()
        return merged

    def dismiss(self, *, wait: bool) -> None:
        """Nobody will take them in. Any rank may call it, several may.

        Args:
            wait: until they have started, so that they end in peace.
        """
        if self._attempt is None:
            return
        if wait:
            self._attempt.wait(_START_S)
        self._attempt.dismiss()
        if wait:  # MPI's messages may go nowhere once this process ends
            deadline = time.monotonic() + _ORDER_S
            while not _all_sent() and time.monotonic() < deadline:
                time.sleep(1e-3)
        self._forget()

    def give_up(self) -> None:
        """They will not all come. Collective over the ranks, but nobody waits."""
        assert self._attempt is not None
        self._attempt.give_up()
        self._forget()

    def _forget(self) -> None:
        assert self._attempt is not None
        self._dismissed.append(self._attempt)
        self._attempt = None


class _Attempt:
    """One call of MPI_Comm_spawn. Its thread knows no other one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.problem = ""
        self.is_in_vain = False
        """MPI was not asked to start any."""
        self.found: MPI.Intercomm | None = None
        self._waiting: list[MPI.Request] = []  # messages that say: I wait to be taken in
        self._thread: threading.Thread | None = None
        self._began = math.inf
        self._lock = threading.Lock()
        self._is_dismissed = False

    def begin(self, comm: MPI.Intracomm) -> None:
        """As ``Recruits.start``."""
        from mpi4py import MPI

        try:
            own = _duplicate(comm)
        except MPI.Exception as error:  # a rank is lost
            self.is_in_vain, self.problem = True, _problem(error)
            return
        self._began = time.monotonic()
        self._thread = threading.Thread(
            target=self._spawn, args=(own,), name="pycomm recruits", daemon=True
        )
        self._thread.start()

    def _spawn(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        try:
            info = MPI.Info.Create({"wdir": launch.FOLDER})
            arguments = command(sys.orig_argv)
            found = comm.Spawn(sys.executable, arguments, maxprocs=self.count, info=info)
            ulfm.raise_errors(found)
        except Exception as error:
            self.problem = _problem(error)
            return
        with self._lock:
            self.found = found
            is_late = self._is_dismissed
        if is_late:
            self.tell(_LEAVE)

    def is_ready(self, rank: int) -> bool:
        """As ``Recruits.are_ready``."""
        from mpi4py import MPI

        if rank != 0:
            return self.found is not None
        try:
            if self.found is not None and not self._waiting:
                self._waiting = [
                    self.found.Irecv([bytearray(1), MPI.BYTE], source, _READY)
                    for source in range(self.count)
                ]
            if self._waiting and MPI.Request.Testall(self._waiting):
                return True
        except MPI.Exception:
            self.problem = "a process that was started ended before it joined"
        # MPI does not always say that one ended, and waits itself for one that ended before it was
        # in MPI.
        if not self.problem and time.monotonic() > self._began + _WAIT_S:
            self.problem = f"a process that was started did not come within {_WAIT_S:g} s"
        return False

    def wait(self, timeout_s: float) -> None:
        """Until the processes have started, or could not be."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def dismiss(self) -> None:
        """They end, now or when they have started."""
        with self._lock:
            self._is_dismissed = True
        if self.found is not None:
            self.tell(_LEAVE)

    def give_up(self) -> None:
        """Those that wait end. MPI may crash in a message to one that is gone, so others get none.

        One that comes later ends by itself.
        """
        from mpi4py import MPI

        with self._lock:
            self._is_dismissed = True
        if self.found is not None:
            failure.bound_end(0)  # MPI_Finalize sends something to those that are gone, too
        for recruit, request in enumerate(self._waiting):
            with contextlib.suppress(MPI.Exception):
                if request.Test():
                    self._tell(recruit, _LEAVE)

    def tell(self, order: bytes) -> None:
        """All of them."""
        for recruit in range(self.count):
            self._tell(recruit, order)

    def _tell(self, recruit: int, order: bytes) -> None:
        from mpi4py import MPI

        assert self.found is not None
        with contextlib.suppress(MPI.Exception):  # it is gone
            _sent.append(self.found.Issend([order, MPI.BYTE], recruit, _ORDER))


def _problem(error: Exception) -> str:
    return f"no process could be started: {error}"


def _duplicate(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Collective.

    Raises:
        As ``Recruits.start``; MPI.Exception if a rank is lost.
    """
    own, request = comm.Idup()
    deadline = time.monotonic() + runtime.default_timeout_s()
    try:
        while not request.Test():
            runtime.check_present([], "elastic.run")
            if time.monotonic() > deadline:
                raise CommTimeoutError(
                    f"elastic.run on rank {comm.Get_rank()} of {comm.Get_size()}: not all ranks "
                    "came to start processes in place of lost ones within "
                    f"{runtime.default_timeout_s():g} s."
                )
            time.sleep(1e-3)
    except CommError:
        _abandoned.append((own, request))
        raise
    ulfm.raise_errors(own)
    return own


# What MPI may still write to.
_abandoned: list[tuple[MPI.Intracomm, MPI.Request]] = []


def check_threads() -> None:
    """
    Raises:
        InvalidArgumentError: MPI cannot be called while it starts processes.
    """
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise InvalidArgumentError(
            "elastic.run: respawns= needs MPI's thread level MULTIPLE, and the program has started "
            "MPI with a lower one.\n  Leave mpi4py.rc.thread_level as it is."
        )


_sent: list[MPI.Request] = []  # MPI may still read what they send


def _all_sent() -> bool:
    from mpi4py import MPI

    try:
        return MPI.Request.Testall(_sent)
    except MPI.Exception:  # to one that is gone
        return True


_enlisted = False


def enlist() -> Members | None:
    """If this process is a recruit, wait to be taken in: with the ranks, and behind them.

    None if it is none, or was taken in before. Ends the process if it is not needed any more.
    """
    global _enlisted
    if _enlisted or not ulfm.is_on(os.environ):
        return None
    _enlisted = True
    from mpi4py import MPI

    parent = MPI.Comm.Get_parent()
    if parent == MPI.COMM_NULL:
        return None
    failure.note_loss()  # why it is here
    ulfm.raise_errors(parent)
    try:
        parent.Send([_READY_TEXT, MPI.BYTE], 0, _READY)
        if _order(parent) == _JOIN:
            return _merged(parent, recruits=True)
    except (MPI.Exception, CommError):  # those that started it have been lost
        pass
    sys.exit(0)


def _merged(others: MPI.Intercomm, recruits: bool) -> Members:
    """The ranks and behind them the recruits. Collective over both.

    Args:
        recruits: whether this process is one.
    """
    merged = ulfm.within(_MERGE_S, "merge", lambda: others.Merge(recruits))
    ulfm.raise_errors(merged)
    try:
        return membership.members_of(merged, _MERGE_S)
    except CommError:
        ulfm.revoke(merged)  # for those that wait for this process
        raise


_READY_TEXT = b"!"


def _order(parent: MPI.Intercomm) -> bytes:
    """What the ranks want: the first word of any of them."""
    from mpi4py import MPI

    received = bytearray(len(_LEAVE))
    deadline = time.monotonic() + _WAIT_S
    while not parent.Iprobe(MPI.ANY_SOURCE, _ORDER):
        if time.monotonic() > deadline:
            return _LEAVE
        time.sleep(5e-3)
    parent.Recv([received, MPI.BYTE], MPI.ANY_SOURCE, _ORDER)
    return bytes(received)
