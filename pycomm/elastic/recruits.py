"""Processes that are started in place of lost ranks, and how they become ranks.

MPI_Comm_spawn takes as long as the new process takes to start and to import torch. So it runs in a
thread of its own, on a communicator of its own, while the others train; a commit takes the recruits
in when all of them wait to be taken in.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from pycomm import failure, ulfm
from pycomm.elastic import membership
from pycomm.elastic.membership import Members
from pycomm.errors import CommError, InvalidArgumentError
from pycomm_launch.recruit import command

if TYPE_CHECKING:
    from mpi4py import MPI

_READY, _ORDER = 7301, 7302  # tags
_JOIN, _LEAVE = b"join", b"away"
_MERGE_S = 60.0
_START_S = 120.0  # for a process to start, when everybody else has finished
_ORDER_S = 5.0
_WAIT_S = 600.0


class Recruits:
    """Those that were started last. Their ranks' side."""

    def __init__(self) -> None:
        self.count = 0
        """Started and not yet taken in."""
        self.problem = ""
        """Why none could be started, if so."""
        self._thread: threading.Thread | None = None
        self._found: list[MPI.Intercomm] = []
        self._waiting: list[MPI.Request] = []  # messages that say: I wait to be taken in

    def start(self, comm: MPI.Intracomm, count: int) -> None:
        """Begin to start ``count`` more of what this process runs. Collective; returns at once."""
        from mpi4py import MPI

        assert self.count == 0
        self.count, self.problem = count, ""
        self._found, self._waiting = [], []
        own, request = comm.Idup()
        try:
            while not request.Test():
                time.sleep(1e-3)
        except MPI.Exception:  # a rank is lost; the next call says so
            return
        ulfm.raise_errors(own)
        info = MPI.Info.Create({"wdir": os.getcwd()})
        arguments = command(sys.orig_argv)

        def spawn() -> None:
            try:
                found = own.Spawn(sys.executable, arguments, maxprocs=count, info=info)
                ulfm.raise_errors(found)
                self._found.append(found)
            except MPI.Exception as error:
                self.problem = str(error)

        self._thread = threading.Thread(target=spawn, name="pycomm recruits", daemon=True)
        self._thread.start()

    def are_ready(self, rank: int) -> bool:
        """Whether they wait to be taken in, as far as this rank, which is ``rank``, knows."""
        from mpi4py import MPI

        if not self._found:
            return False
        if rank != 0:
            return True
        if not self._waiting:
            self._waiting = [
                self._found[0].Irecv([bytearray(1), MPI.BYTE], source, _READY)
                for source in range(self.count)
            ]
        try:
            return MPI.Request.Testall(self._waiting)
        except MPI.Exception:  # one is gone again
            return False

    def merged(self, rank: int) -> Members | None:
        """The ranks and behind them the recruits; None if that fails. Collective over the ranks."""
        from mpi4py import MPI

        try:
            if rank == 0:
                self._tell(_JOIN)
            merged = _merged(self._found[0], recruits=False)
        except (MPI.Exception, CommError):
            return None
        self.count = 0
        return merged

    def dismiss(self, *, wait: bool) -> None:
        """Nobody will take them in. Any rank may call it, several may.

        Args:
            wait: until they have started, so that they end in peace.
        """
        if self._thread is not None and wait:
            self._thread.join(_START_S)
        if self._found and self.count:
            self._tell(_LEAVE)
            if wait:  # MPI's messages may go nowhere once this process ends
                deadline = time.monotonic() + _ORDER_S
                while not _all_sent() and time.monotonic() < deadline:
                    time.sleep(1e-3)
        self.count = 0
        self._found, self._thread = [], None

    def _tell(self, order: bytes) -> None:
        from mpi4py import MPI

        for recruit in range(self.count):
            with contextlib.suppress(MPI.Exception):  # it is gone
                _sent.append(self._found[0].Issend([order, MPI.BYTE], recruit, _ORDER))


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
