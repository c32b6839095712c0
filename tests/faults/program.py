"""What every rank runs.

    python -m faults.program FOLDER FAULT...

Each fault in turn. A rank notes in FOLDER/rank-R.jsonl, with the clock that all ranks of a machine
share, what it raised, whether another call works, and whether ``shutdown()`` and ``init()`` do. A
fault that loses a rank is the last.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import journal
import torch
from chaos.job import warm_up
from journal import Journal

import pycomm
from faults.every import FAULTS
from faults.fault import RANKS, Fault, Part

_FIRST_INIT_S = 60.0


def raised_by(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def make(fault: Fault, part: Part, notes: Journal) -> None:
    """The fault, and what comes after."""
    error = raised_by(lambda: fault.do(part))
    notes.write(
        "saw",
        fault=fault.name,
        type="" if error is None else type(error).__name__,
        text=str(error or ""),
        usable=getattr(error, "group_usable", None),
    )
    if fault.lost and part.is_victim and error is not None:
        raise error
    if part.again is not None and not fault.early:
        for deed in part.afterwards:
            deed()
        failed = raised_by(part.again)
        notes.write("again", fault=fault.name, works=failed is None, text=str(failed or ""))


def start_over(fault: Fault, notes: Journal) -> None:
    def attempt() -> None:
        with contextlib.suppress(pycomm.CommError):  # of the group that is over
            pycomm.shutdown()
        pycomm.init()
        pycomm.barrier()

    failed = raised_by(attempt)
    notes.write("over", fault=fault.name, works=failed is None, text=str(failed or ""))
    if failed is not None:
        raise failed


def leave(folder: Path, fault: Fault) -> None:
    """As after a fault: MPI would wait for who is gone. Not before all have seen it."""
    deadline = time.monotonic() + 20
    awaited = [rank for rank in range(RANKS) if fault.expected(rank)]
    while time.monotonic() < deadline:
        seen = [journal.read(folder, rank) for rank in awaited]
        if all(any(line["event"] == "saw" for line in lines) for lines in seen):
            break
        time.sleep(0.05)
    time.sleep(0.5)
    os._exit(0)


def main(folder: Path, names: list[str]) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    torch.set_num_threads(1)
    notes = Journal(folder, rank)
    warm_up()
    faults = [FAULTS[name] for name in names]
    if not faults[0].early:
        pycomm.init(timeout_s=_FIRST_INIT_S)
        pycomm.shutdown()
        pycomm.init()  # with the deadline of the environment
    for fault in faults:
        part = Part(
            rank,
            rank == fault.victim_rank,
            lambda event, name=fault.name: notes.write(event, fault=name),  # type: ignore[misc]
            float(os.environ["PYCOMM_TIMEOUT_S"]),
            pycomm.barrier,
        )
        make(fault, part, notes)
        if fault.lost:
            leave(folder, fault)
        start_over(fault, notes)
    pycomm.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
