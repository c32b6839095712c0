"""``python -m chaos.peers``: how soon survivors of a fault hear of it, beside gloo and Open MPI.

Four ranks all-reduce without end; one of them, or a host of two, is broken. Every survivor notes
when its call fails, and sums that are wrong. The peers take turns, so that all meet the same load
of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster import Cluster
from launchers import ULFM_BETWEEN_HOSTS, files_of_mpirun, mpirun_command, process_options
from rich.console import Console
from rich.table import Table

from chaos import processes
from chaos.peer_rank import LONGEST_S, PEERS, TIMEOUT_S
from chaos.plan import HOST_KINDS, RANK_KINDS, RANKS, RANKS_OF_A_HOST

KINDS = (*RANK_KINDS, *HOST_KINDS)
_START_S = 60.0
_LOST_HOST = 1


@dataclass
class Heard:
    """By the survivors of all rounds of a fault with a peer."""

    seconds: list[float] = field(default_factory=list)  # LONGEST_S: never
    wrong: int = 0  # survivors that got a wrong sum


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    chosen = parser.parse_args(arguments)
    heard: dict[tuple[str, str], Heard] = {}
    for number in range(chosen.rounds):
        for kind in chosen.kinds:
            for peer in PEERS:
                _run_round(peer, kind, number, heard.setdefault((kind, peer), Heard()))
    Console(soft_wrap=True, width=120).print(_table(heard))
    return 0


def _table(heard: dict[tuple[str, str], Heard]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("fault", "peer", "survivors", "told", "wrong sums", "p50 s", "p99 s"):
        table.add_column(title, justify="left" if title in ("fault", "peer") else "right")
    for (kind, peer), found in heard.items():
        told = sum(value < LONGEST_S for value in found.seconds)
        cuts = statistics.quantiles(found.seconds, n=100, method="inclusive")
        shown = [f"{cut:.3f}" if cut < LONGEST_S else f"> {LONGEST_S:g}" for cut in cuts]
        counts = [str(len(found.seconds)), str(told), str(found.wrong)]
        table.add_row(kind, peer, *counts, shown[49], shown[98])
    return table


# --- one round -----------------------------------------------------------------------------------


def _run_round(peer: str, kind: str, number: int, heard: Heard) -> None:
    generator = random.Random(f"{kind}/{number}")
    rank, delay_s = generator.randrange(RANKS), generator.uniform(0.2, 1.0)
    lost = [rank]
    if kind in HOST_KINDS:
        lost = [_LOST_HOST * RANKS_OF_A_HOST + i for i in range(RANKS_OF_A_HOST)]
    survivors = [one for one in range(RANKS) if one not in lost]
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        cluster = None
        if kind in HOST_KINDS:
            cluster = stack.enter_context(Cluster([RANKS_OF_A_HOST] * 2))
        fault = {"kind": kind, "rank": rank, "delay_s": delay_s, "folder": temporary}
        stack.enter_context(_started(peer, json.dumps(fault), temporary, cluster))
        _wait(lambda: all((folder / f"rank-{one}.ready").exists() for one in range(RANKS)))
        if cluster is not None:
            time.sleep(delay_s)
            broke = time.monotonic()
            cluster.cut(_LOST_HOST) if kind == "cut" else cluster.power_off(_LOST_HOST)
        else:
            _wait(lambda: _time_in(folder / f"rank-{rank}") is not None)
            broke = _time_in(folder / f"rank-{rank}") or 0.0
        while time.monotonic() < broke + LONGEST_S:
            told = [_time_in(folder / f"rank-{one}") for one in survivors]
            if all(told):
                break
            time.sleep(0.05)
        heard.wrong += sum((folder / f"rank-{one}.wrong").exists() for one in survivors)
    heard.seconds += [min((at or float("inf")) - broke, LONGEST_S) for at in told]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the ranks did not come to their fault")
        time.sleep(0.01)


def _time_in(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


@contextlib.contextmanager
def _started(peer: str, fault: str, value: str, cluster: Cluster | None) -> Iterator[None]:
    command = [sys.executable, "-m", "chaos.peer_rank", peer, fault]
    environ = {
        **(cluster.environment() if cluster else files_of_mpirun(Path(value))),
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYCOMM_TRACE_FOLDER": "",
        "PYCOMM_HOST_TIMEOUT_S": str(TIMEOUT_S),
        processes.VARIABLE: value,
    }
    if peer == "gloo":
        commands = [
            ([*(cluster.prefix(rank // RANKS_OF_A_HOST) if cluster else []), *command], one)
            for rank, one in enumerate(_gloo_environments(cluster))
        ]
    elif cluster is not None:
        commands = [([*cluster.mpirun_command("slot", *ULFM_BETWEEN_HOSTS), *command], {})]
    else:
        commands = [([*mpirun_command(RANKS, "--with-ft", "ulfm"), *command], {})]
    started = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **process_options(**environ, **more),
        )
        for command, more in commands
    ]
    try:
        yield
    finally:
        processes.end(value)
        for process in started:
            process.kill()
            process.wait()


def _gloo_environments(cluster: Cluster | None) -> list[dict[str, str]]:
    if cluster is not None:
        meeting = {
            "MASTER_ADDR": cluster.address(0),
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**meeting, "WORLD_SIZE": str(RANKS), "RANK": str(rank)} for rank in range(RANKS)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
