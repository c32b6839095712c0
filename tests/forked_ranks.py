"""Ranks that are forked from one process which has imported torch: a start takes no time.

A program calls ``run_all``, which forks ranks for one scenario after the other and watches them.
In a rank, ``run_all`` returns what the rank has to do, for the program to do last: it then ends as
any Python process does, with its exit handlers and its hooks.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launchers import process_options


@dataclasses.dataclass(frozen=True)
class Scenario:
    """``body(rank)`` runs on each of ``size`` ranks."""

    body: Callable[[Rank], object]
    size: int = 2
    timeout_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class Rank:
    rank: int
    size: int
    folder: Path  # of the scenario; empty when it begins, for all ranks

    def report(self, **values: Any) -> None:
        """For the ``Outcome``; the values can be written as JSON."""
        with open(self.folder / f"reports{self.rank}", "a") as file:
            file.write(json.dumps(values) + "\n")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a rank went. ``seconds`` is from the scenario's start to the end of the process."""

    returncode: int | None  # None: it was still there when the time was up, and was killed
    seconds: float
    reports: list[dict[str, Any]]
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """All it reported, later values over earlier ones."""
        return {key: value for report in self.reports for key, value in report.items()}


def run_all(scenarios: Mapping[str, Scenario], folder: Path) -> Callable[[], object] | None:
    """Run them in turn; ``outcomes.json`` in ``folder`` tells of each. None in this process."""
    outcomes: dict[str, list[dict[str, Any]]] = {}
    gc.freeze()  # or each rank would look at, and copy, all that was imported when it ends
    for name, scenario in scenarios.items():
        place = folder / name
        place.mkdir()
        children = []
        began = time.monotonic()
        for rank in range(scenario.size):
            child = os.fork()
            if child == 0:
                return lambda: _become(scenario, Rank(rank, scenario.size, place))
            children.append(child)
        ends = _watch(children, began, scenario.timeout_s)
        outcomes[name] = [_outcome(place, rank, *end) for rank, end in enumerate(ends)]
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    return None


def run_program(
    program: str, folder: Path, timeout_s: float, *scenarios: str
) -> dict[str, list[Outcome]]:
    """Run a program of this folder that does so; what became of each scenario's ranks.

    It gets the names of scenarios as arguments, if they are given.
    """
    done = subprocess.run(
        [sys.executable, program, str(folder), *scenarios],
        capture_output=True,
        timeout=timeout_s,
        **process_options(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((folder / "outcomes.json").read_text())
    return {name: [Outcome(**rank) for rank in ranks] for name, ranks in outcomes.items()}


def _become(scenario: Scenario, rank: Rank) -> None:
    errors = os.open(rank.folder / f"err{rank.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.size),
        LOCAL_RANK=str(rank.rank),
        LOCAL_WORLD_SIZE=str(rank.size),
    )
    scenario.body(rank)


def _watch(children: list[int], began: float, timeout_s: float) -> list[tuple[int | None, float]]:
    ends: dict[int, tuple[int | None, float]] = {}
    while len(ends) < len(children):
        late = time.monotonic() - began > timeout_s
        for child in children:
            if child in ends:
                continue
            if late:
                os.kill(child, signal.SIGUSR1)  # print where it is
                time.sleep(0.5)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                ends[child] = None, time.monotonic() - began
            elif (status := os.waitpid(child, os.WNOHANG)) != (0, 0):
                ends[child] = os.waitstatus_to_exitcode(status[1]), time.monotonic() - began
        time.sleep(0.01)
    return [ends[child] for child in children]


def _outcome(place: Path, rank: int, returncode: int | None, seconds: float) -> dict[str, Any]:
    reports, errors = place / f"reports{rank}", place / f"err{rank}"
    return {
        "returncode": returncode,
        "seconds": seconds,
        "reports": [json.loads(line) for line in reports.read_text().splitlines()]
        if reports.exists()
        else [],
        "err": errors.read_text() if errors.exists() else "",
    }
