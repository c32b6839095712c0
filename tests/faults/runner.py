"""Start jobs whose ranks run faults, and collect what they noted."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import journal
from chaos import processes
from cluster import Cluster
from journal import Line
from launchers import ULFM_BETWEEN_HOSTS, files_of_mpirun, mpirun_command, process_options

from faults.fault import RANKS, Fault

CALL_TIMEOUT_S = {1: 6.0, 2: 12.0}  # by the number of hosts
HOST_TIMEOUT_S = 6.0
_SILENCE_S = 90.0  # no rank notes anything for so long: the job hangs
_END_S = 5.0  # for a job whose ranks have noted everything


@dataclass
class Seen:
    """What came of a fault that was made once: the notes of each rank, of this fault."""

    notes: list[list[Line]]
    output: str
    hung: bool = False

    def find(self, rank: int, event: str) -> Line | None:
        return next((note for note in self.notes[rank] if note["event"] == event), None)


def make_all(faults: Sequence[Fault]) -> Iterator[tuple[Fault, Seen]]:
    """Make each fault once. Those after which ranks start over share a job."""
    for hosts in (1, 2):
        of_hosts = [fault for fault in faults if fault.hosts == hosts]
        together = [fault for fault in of_hosts if not fault.lost]
        while together:  # where one hangs, the others go on without it
            done = 0
            for fault, seen in _job(together):
                yield fault, seen
                done += 1
                if seen.hung or any(seen.find(rank, "over") is None for rank in range(RANKS)):
                    break
            together = together[done:]
        for fault in of_hosts:
            if fault.lost:
                yield from _job([fault])


def _job(faults: Sequence[Fault]) -> list[tuple[Fault, Seen]]:
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        with _started(folder, faults) as (job, cluster):
            watch = _Watch(faults, folder, job, cluster)
            try:
                watch.run()
            finally:
                processes.end(temporary)
                job.kill()
                job.wait()
        return [(fault, watch.seen(fault)) for fault in faults]


@contextmanager
def _started(
    folder: Path, faults: Sequence[Fault]
) -> Iterator[tuple[subprocess.Popen[str], Cluster | None]]:
    hosts, names = faults[0].hosts, [fault.name for fault in faults]
    command = [sys.executable, "-m", "faults.program", str(folder), *names]
    environ = {
        processes.VARIABLE: str(folder),
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYCOMM_TIMEOUT_S": str(CALL_TIMEOUT_S[hosts]),
        "PYCOMM_HOST_TIMEOUT_S": str(HOST_TIMEOUT_S),
        "PYCOMM_TRACE_FOLDER": "",
    }
    options = process_options(**environ, **files_of_mpirun(folder))
    output = open(folder / "output", "w")  # noqa: SIM115
    streams: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": output,
        "stderr": subprocess.STDOUT,
        "start_new_session": True,
    }
    if hosts == 1:
        launcher = mpirun_command(RANKS, "--with-ft", "ulfm")
        yield subprocess.Popen([*launcher, *command], **options, **streams), None
        return
    with Cluster([RANKS // hosts] * hosts) as cluster:
        launcher = cluster.mpirun_command("slot", *(ULFM_BETWEEN_HOSTS if faults[0].ulfm else ()))
        options["env"] = {**options["env"], **cluster.environment(), **environ}
        yield subprocess.Popen([*launcher, *command], **options, **streams), cluster


class _Watch:
    """Follows a job to its end, and makes the faults that come from outside."""

    def __init__(
        self,
        faults: Sequence[Fault],
        folder: Path,
        job: subprocess.Popen[str],
        cluster: Cluster | None,
    ) -> None:
        self._faults, self._folder, self._job, self._cluster = faults, folder, job, cluster
        self._notes: list[list[Line]] = [[] for _ in range(RANKS)]
        self._own: list[Line] = []  # what is seen from outside
        self._hung = False

    def run(self) -> None:
        last = time.monotonic()
        while True:
            ended = self._job.poll() is not None
            if self._read():
                last = time.monotonic()
            if ended:
                self._own.append({"event": "job ended", "t": time.monotonic()})
                return
            quiet = time.monotonic() - last
            if self._all_saw() and quiet > _END_S:
                return  # mpirun may wait for a host that is gone
            if quiet > _SILENCE_S:
                self._hung = True
                return
            self._make_from_outside()
            time.sleep(0.02)

    def seen(self, fault: Fault) -> Seen:
        """Of this fault; of a rank that was ended, when and with which words."""
        notes = [
            [note for note in of_rank if note["fault"] == fault.name] for of_rank in self._notes
        ]
        ends = [note for note in self._own if note["event"] == "job ended"]
        for note in self._own:
            if note["event"] in ("said", "began"):
                notes[note["rank"]].append(note)
        for of_rank in notes:
            of_rank += ends
        return Seen(notes, self._output(), self._hung)

    def _read(self) -> bool:
        """Whether there is something new."""
        before = sum(map(len, self._notes)) + len(self._own)
        for rank in range(RANKS):
            self._notes[rank] = journal.read(self._folder, rank)
        said = {note["rank"] for note in self._own if note["event"] == "said"}
        if self._faults[0].says:
            for match in re.finditer(self._faults[0].says, self._output()):
                if (rank := int(match[1])) not in said:
                    said.add(rank)
                    self._own.append(
                        {"event": "said", "rank": rank, "text": match[0], "t": time.monotonic()}
                    )
        return sum(map(len, self._notes)) + len(self._own) > before

    def _all_saw(self) -> bool:
        fault = self._faults[-1]
        return all(
            any(note["event"] == "saw" and note["fault"] == fault.name for note in notes)
            for rank, notes in enumerate(self._notes)
            if fault.expected(rank)
        )

    def _make_from_outside(self) -> None:
        deed = self._faults[0].outside
        ready = [any(note["event"] == "ready" for note in notes) for notes in self._notes]
        if not deed or self._own or not all(ready):
            return
        assert self._cluster is not None
        time.sleep(0.5)
        now = time.monotonic()
        self._own += [{"event": "began", "rank": rank, "t": now} for rank in range(RANKS)]
        getattr(self._cluster, deed)(1)

    def _output(self) -> str:
        return (self._folder / "output").read_text(errors="replace")
