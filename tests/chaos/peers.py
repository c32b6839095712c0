"""``python -m chaos.peers``: how soon survivors of a fault hear of it, beside gloo and Open MPI.

Four ranks all-reduce without end; one of them is killed, stopped or raises. Every survivor notes
when its call fails. The peers take turns, so that all meet the same load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers import mpirun_command, process_options
from rich.console import Console
from rich.table import Table

from chaos import processes
from chaos.plan import RANKS

PEERS = ("pycomm", "gloo", "Open MPI")
KINDS = ("kill", "stop", "raise")
LONGEST_S = 20.0  # after which a survivor is said to wait for ever
_TIMEOUT_S = 3.0  # of pycomm's and gloo's calls


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", nargs=2, metavar=("PEER", "FAULT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.rank:
        _run_rank(*chosen.rank)
        return 0
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(chosen.rounds):
        for kind in KINDS:
            for peer in PEERS:
                seconds.setdefault((kind, peer), []).extend(_run_round(peer, kind, number))
    Console(soft_wrap=True).print(_table(seconds))
    return 0


def _table(seconds: dict[tuple[str, str], list[float]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("fault", "peer", "survivors", "told", "p50 s", "p99 s"):
        table.add_column(title, justify="left" if title in ("fault", "peer") else "right")
    for (kind, peer), values in seconds.items():
        told = [value for value in values if value < LONGEST_S]
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        shown = [f"{cut:.3f}" if cut < LONGEST_S else f"> {LONGEST_S:g}" for cut in cuts]
        table.add_row(kind, peer, str(len(values)), str(len(told)), shown[49], shown[98])
    return table


# --- one round -----------------------------------------------------------------------------------


def _run_round(peer: str, kind: str, number: int) -> list[float]:
    """Seconds from the fault to each survivor's error; LONGEST_S for one that gets none."""
    generator = random.Random(f"{kind}/{number}")
    fault = {
        "kind": kind,
        "rank": generator.randrange(RANKS),
        "delay_s": generator.uniform(0.2, 1.0),
    }
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        fault["folder"] = temporary
        started = _start(peer, json.dumps(fault), temporary)
        times = Path(temporary)
        deadline = time.monotonic() + 60.0 + LONGEST_S
        while time.monotonic() < deadline:
            broke = _time_in(times / f"rank-{fault['rank']}")
            told = [_time_in(times / f"rank-{rank}") for rank in range(RANKS)]
            if broke and (all(told) or time.monotonic() > broke + LONGEST_S):
                break
            time.sleep(0.05)
        processes.end(temporary)
        for process in started:
            process.wait()
    if not broke:
        raise RuntimeError(f"{peer}: rank {fault['rank']} did not come to its fault")
    return [
        min((when - broke) if when else LONGEST_S, LONGEST_S)
        for rank, when in enumerate(told)
        if rank != fault["rank"]
    ]


def _time_in(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _start(peer: str, fault: str, value: str) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "chaos.peers", "--rank", peer, fault]
    options = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "start_new_session": True,
    }
    path = str(Path(__file__).parent.parent)
    environ = {"PYTHONPATH": path, "PYCOMM_TRACE_FOLDER": "", processes.VARIABLE: value}
    if peer != "gloo":
        launcher = mpirun_command(RANKS, "--with-ft", "ulfm")
        return [subprocess.Popen([*launcher, *command], **process_options(**environ), **options)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    return [
        subprocess.Popen(command, **process_options(**environ, RANK=str(rank)), **options)
        for rank in range(RANKS)
    ]


# --- one rank ------------------------------------------------------------------------------------


def _run_rank(peer: str, text: str) -> None:
    fault = json.loads(text)
    rank, all_reduce = {"pycomm": _pycomm, "gloo": _gloo, "Open MPI": _open_mpi}[peer]()
    note = Path(fault["folder"]) / f"rank-{rank}"
    all_reduce()
    due = time.monotonic() + (fault["delay_s"] if rank == fault["rank"] else 1e9)
    try:
        while time.monotonic() < due:
            all_reduce()
    except Exception:
        note.write_text(str(time.monotonic()))
        time.sleep(LONGEST_S)  # gloo's neighbours hear of a rank that ends
        raise
    note.write_text(str(time.monotonic()))
    if fault["kind"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault["kind"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise ValueError("bad batch")


def _pycomm() -> tuple[int, Callable[[], object]]:
    import torch

    import pycomm

    pycomm.init(timeout_s=_TIMEOUT_S)
    tensor = torch.zeros(1000)
    return pycomm.rank(), lambda: pycomm.all_reduce_(tensor)


def _gloo() -> tuple[int, Callable[[], object]]:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_S))
    tensor = torch.zeros(1000)
    return dist.get_rank(), lambda: dist.all_reduce(tensor)


def _open_mpi() -> tuple[int, Callable[[], object]]:
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    values, sums = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    return comm.rank, lambda: comm.Allreduce(values, sums)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
