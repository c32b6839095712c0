"""What a rank of a broken job does beside its work: it notes what it sees, and breaks itself.

The victim breaks itself, since it knows best when a phase has begun.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from journal import Journal

import pycomm
from chaos.plan import Fault


def open_journal(folder: Path, rank: int) -> Journal:
    """Where this rank says what it sees, to the one who counts.

    What it writes to stderr is kept in the folder, too: from a host that was cut off it comes no
    other way.
    """
    with open(folder / f"rank-{rank}.stderr", "wb") as words:
        os.dup2(words.fileno(), sys.stderr.fileno())
    return Journal(folder, rank)


class ChaosError(Exception):
    """What the victim raises."""


class Victim:
    """Breaks this rank if it is the victim, once the moment has come."""

    def __init__(self, fault: Fault, rank: int, journal: Journal) -> None:
        self._fault = fault if rank in fault.victims else None
        self._delay_s = fault.delay_s * (1.0 if rank == fault.rank else 1.5)
        self._journal = journal
        self._due = threading.Event()

    def enter(self, phase: str) -> None:
        """The phase begins."""
        self._journal.write("phase", phase=phase)
        if self._fault is None or self._fault.phase != phase:
            return
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        assert self._fault is not None
        time.sleep(self._delay_s)
        if self._fault.kind in ("kill", "recover", "stop"):
            self._journal.write("fault")
            stops = self._fault.kind == "stop"
            os.kill(os.getpid(), signal.SIGSTOP if stops else signal.SIGKILL)
        elif self._fault.kind in ("raise", "differ", "leave"):
            self._due.set()

    def here(self) -> None:
        """Between two calls: what a program does wrong it does here."""
        if not self._due.is_set():
            return
        assert self._fault is not None
        self._due.clear()
        self._journal.write("fault")
        if self._fault.kind == "raise":
            raise ChaosError("bad batch")
        if self._fault.kind == "leave":
            pycomm.shutdown()
            return
        pycomm.all_reduce_(torch.zeros(3, dtype=torch.int64))  # which nobody else does
