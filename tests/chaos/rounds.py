"""One round: start the job, let the fault happen, and count what must not be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from launchers import mpirun_command, process_options

from chaos import processes
from chaos.plan import RANKS, Fault

# In seconds. A start takes 5 on an idle core; the deadline of the job's calls is the first.
CALL_TIMEOUT_S = 8.0
JOB_TIMEOUT_S = 90.0  # after which a job counts as hanging
LEFT_BEHIND_S = 5.0  # for processes to go after mpirun has

COUNTED = ("hangs", "wrong names", "wrong sums", "untyped errors", "silent ranks", "leaks")

# The error that every survivor is to get. At shutdown, and for a rank that only leaves, some may
# have ended already, and that is no fault.
_EXPECTED = {
    "kill": ("PeerLostError",),
    "stop": ("CommTimeoutError",),
    "raise": ("PeerLostError", "StageError"),
    "differ": ("MismatchError",),
    "leave": ("MismatchError",),
}


@dataclass
class Outcome:
    """What came of a round. All counts are to be zero."""

    fault: str
    kind: str
    phase: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    notes: list[str] = field(default_factory=list)
    seconds_to_error: list[float] = field(default_factory=list)  # of each survivor
    usable: list[bool | None] = field(default_factory=list)
    exit_code: int | None = None
    happened: bool = False  # a fault late in its phase may find the job over

    def count(self, what: str, note: str) -> None:
        self.counts[what] += 1
        self.notes.append(f"{what}: {note}")


def run(fault: Fault, folder: Path) -> Outcome:
    """Run the job once with this fault; ``folder`` is empty."""
    outcome = Outcome(str(fault), fault.kind, fault.phase)
    before = _shared_memory()
    job = [sys.executable, "-m", "chaos.job", str(folder), fault.encode()]
    process = subprocess.Popen(
        [*mpirun_command(RANKS, "--with-ft", "ulfm"), *job],
        stdout=open(folder / "output", "w"),  # noqa: SIM115
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **process_options(
            **{processes.VARIABLE: str(folder)},
            PYTHONPATH=str(Path(__file__).parent.parent),
            PYCOMM_TIMEOUT_S=str(CALL_TIMEOUT_S),
            PYCOMM_TRACE_FOLDER=str(folder / "traces"),
        ),
    )
    try:
        outcome.exit_code = process.wait(JOB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        outcome.count("hangs", f"mpirun still ran after {JOB_TIMEOUT_S:g} s")
    finally:
        left = processes.left_after(
            str(folder), 0.0 if outcome.exit_code is None else LEFT_BEHIND_S
        )
        processes.end(str(folder))
        if process.poll() is None:
            process.kill()
        process.wait()
    if outcome.exit_code is not None and left:
        outcome.count("leaks", f"processes {left}")
    for path in sorted(_shared_memory() - before):
        if "pycomm" in path:
            outcome.count("leaks", f"shared memory {path}")
    _judge(outcome, fault, _reports(folder), folder)
    return outcome


def _judge(
    outcome: Outcome, fault: Fault, reports: dict[int, list[dict[str, object]]], folder: Path
) -> None:
    broke = [line for line in reports.get(fault.rank, []) if line["event"] == "fault"]
    outcome.happened = bool(broke)
    for rank, lines in sorted(reports.items()):
        for line in lines:
            if line["event"] == "wrong":
                outcome.count("wrong sums", f"rank {rank}: {line['what']}: {line['found']}")
        if rank == fault.rank and fault.kind not in ("differ",):
            continue
        errors = [line for line in lines if line["event"] == "error"]
        ended = any(line["event"] == "end" for line in lines)
        for error in errors:
            _judge_error(outcome, fault, rank, error, bool(broke))
            if broke and error["t"] is not None:
                outcome.seconds_to_error.append(float(str(error["t"])) - float(str(broke[0]["t"])))
        if not errors and not ended and broke:
            outcome.count("silent ranks", f"rank {rank} ended without an error")
        if not errors and not broke and not ended:
            outcome.count("silent ranks", f"rank {rank} did not end, and there was no fault")
    for path in folder.rglob("*.new"):
        outcome.count("leaks", f"file {path.name}")


def _judge_error(
    outcome: Outcome, fault: Fault, rank: int, error: dict[str, object], broke: bool
) -> None:
    kind, text = str(error["type"]), str(error["text"])
    usable = error.get("usable")
    outcome.usable.append(usable if isinstance(usable, bool) else None)
    if not error["typed"]:
        outcome.count("untyped errors", f"rank {rank}: {kind}: {text[:300]}")
    elif not broke:
        outcome.count("wrong names", f"rank {rank}: an error without a fault: {kind}: {text[:300]}")
    elif kind == "Watchdog":
        pass  # MPI has not told who is missing
    elif kind not in _EXPECTED[fault.kind]:
        outcome.count("wrong names", f"rank {rank}: {kind}: {text[:300]}")
    elif not re.search(rf"rank {fault.rank}\b", text):
        outcome.count("wrong names", f"rank {rank} does not name the victim: {text[:300]}")


def _reports(folder: Path) -> dict[int, list[dict[str, object]]]:
    found: dict[int, list[dict[str, object]]] = {}
    for rank in range(RANKS):
        path = folder / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found[rank] = [json.loads(line) for line in lines if line.endswith("}")]
    # A rank that MPI_Init holds cannot write anything: it ends with words of the core.
    output = (folder / "output").read_text(errors="replace")
    for match in re.finditer(r"init on rank (\d+): MPI did not start within.*", output):
        found[int(match[1])].append(
            {"event": "error", "type": "Watchdog", "typed": True, "text": match[0], "t": None}
        )
    return found


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
