"""One rank of ``chaos.peers``: all-reduces without end, breaks if it is its turn, and notes errors.

python -m chaos.peer_rank PEER FAULT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path

from chaos.plan import RANKS

LONGEST_S = 20.0  # after which a survivor is said to wait for ever
TIMEOUT_S = 6.0  # of pycomm's and gloo's calls
ELEMENTS = 1000


class Peer(ABC):
    """A library, joined."""

    rank: int

    @abstractmethod
    def all_reduce(self) -> float:
        """Each rank brings ones; an element of the sum, and another one if not all are equal."""

    @abstractmethod
    def differ(self) -> object:
        """A call that no other rank makes."""

    @abstractmethod
    def leave(self) -> object:
        """What a program calls at its end."""


class Pycomm(Peer):
    def __init__(self) -> None:
        import torch

        import pycomm

        pycomm.init(timeout_s=TIMEOUT_S)
        self.rank = pycomm.rank()
        self._torch, self._pycomm = torch, pycomm

    def all_reduce(self) -> float:
        total = self._pycomm.all_reduce(self._torch.ones(ELEMENTS))
        return float(total.min()) if total.min() == total.max() else -1.0

    def differ(self) -> object:
        return self._pycomm.all_reduce(self._torch.ones(ELEMENTS // 2))

    def leave(self) -> object:
        return self._pycomm.shutdown()


class Gloo(Peer):
    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
        self.rank = dist.get_rank()
        self._torch, self._dist = torch, dist

    def all_reduce(self) -> float:
        tensor = self._torch.ones(ELEMENTS)
        self._dist.all_reduce(tensor)
        return float(tensor.min()) if tensor.min() == tensor.max() else -1.0

    def differ(self) -> object:
        return self._dist.all_reduce(self._torch.ones(ELEMENTS // 2))

    def leave(self) -> object:
        return self._dist.destroy_process_group()


class OpenMpi(Peer):
    def __init__(self) -> None:
        import numpy as np
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank = self._comm.rank
        self._numpy, self._mpi = np, MPI

    def all_reduce(self) -> float:
        sums = self._numpy.empty(ELEMENTS, self._numpy.float32)
        self._comm.Allreduce(self._numpy.ones_like(sums), sums)
        return float(sums.min()) if sums.min() == sums.max() else -1.0

    def differ(self) -> object:
        sums = self._numpy.empty(ELEMENTS // 2, self._numpy.float32)
        return self._comm.Allreduce(self._numpy.ones_like(sums), sums)

    def leave(self) -> object:
        return self._mpi.Finalize()


PEERS: dict[str, type[Peer]] = {"pycomm": Pycomm, "gloo": Gloo, "Open MPI": OpenMpi}


def main(name: str, text: str) -> None:
    fault = json.loads(text)
    peer = PEERS[name]()
    note = Path(fault["folder"]) / f"rank-{peer.rank}"
    peer.all_reduce()
    note.with_suffix(".ready").touch()
    mine = peer.rank == fault["rank"] and fault["kind"] not in ("cut", "power off")
    due = time.monotonic() + (fault["delay_s"] if mine else 1e9)
    try:
        while time.monotonic() < due:
            if peer.all_reduce() != RANKS:
                note.with_suffix(".wrong").touch()
        note.write_text(str(time.monotonic()))
        _break(peer, fault["kind"])
    except Exception:
        if not mine:
            note.write_text(str(time.monotonic()))
        time.sleep(LONGEST_S)  # gloo's neighbours hear of a rank that ends
        raise


def _break(peer: Peer, kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "differ":
        peer.differ()
        while True:
            peer.all_reduce()
    if kind == "leave":
        peer.leave()
        time.sleep(LONGEST_S)
        return
    # What is raised here ends the process at once, unlike an error of a survivor.
    sys.excepthook(ValueError, ValueError("bad batch"), None)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
