"""What came of a round, judged by what its ranks have noted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from journal import Line

from chaos.plan import RANKS, RANKS_OF_A_HOST, Fault
from chaos.reports import LEFT_MPI

COUNTED = (
    "hangs",
    "wrong names",
    "wrong sums",
    "wrong commits",
    "untyped errors",
    "silent ranks",
    "exit codes",
    "leaks",
)

# The error that every survivor is to get. At shutdown, and for a rank that only leaves, some may
# have ended already, and that is no fault.
_EXPECTED = {
    "kill": ("PeerLostError",),
    "stop": ("CommTimeoutError",),
    "raise": ("PeerLostError", "StageError"),
    "differ": ("MismatchError",),
    "leave": ("MismatchError",),
    "cut": ("PeerLostError",),
    "power off": ("PeerLostError",),
}

# Before its own end, so much, may a fault come that a rank has not noticed: it had left the job,
# and was about to say so.
_UNNOTICED_S = 1.0


@dataclass
class Outcome:
    """What came of a round. All counts are to be zero."""

    fault: str
    kind: str
    phase: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    notes: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # to each survivor's error, or new beginning
    usable: list[bool | None] = field(default_factory=list)
    happened: bool = False  # a fault late in its phase may find the job over

    def count(self, what: str, note: str) -> None:
        self.counts[what] += 1
        self.notes.append(f"{what}: {note}")


def judge(
    outcome: Outcome,
    fault: Fault,
    reports: dict[int, list[Line]],
    broke: float | None,
    exit_code: int | None,
) -> None:
    """Count what must not be in ``reports``. The fault happened at ``broke``, or did not.

    Args:
        exit_code: the launcher's; None if it had to be ended.
    """
    outcome.happened = broke is not None
    for rank, lines in sorted(reports.items()):
        for line in lines:
            if line["event"] == "wrong":
                outcome.count("wrong sums", f"rank {rank}: {line['what']}: {line['found']}")
        if not _is_judged(fault, rank, lines):
            continue
        errors = [line for line in lines if line["event"] == "error"]
        ended = any(line["event"] == "end" for line in lines)
        for error in errors:
            _judge_error(outcome, fault, rank, error, broke is not None)
            if broke is not None and error["t"] is not None:
                outcome.seconds.append(error["t"] - broke)
        if not ended and not errors and rank not in _leave_to_others(fault, broke):
            why = "" if broke is not None else ", and there was no fault"
            outcome.count("silent ranks", f"rank {rank} ended without an error{why}")
    _judge_waits_in_mpi(outcome, reports, broke)
    _judge_exit_code(outcome, fault, reports, exit_code)
    if fault.is_elastic:
        _judge_commits(outcome, reports, broke)


def _is_judged(fault: Fault, rank: int, lines: list[Line]) -> bool:
    """What differs raises as the others do, and a host that was cut off goes on."""
    if rank not in fault.victims or fault.kind == "differ" or fault.of_host == "cut":
        return True
    # The second of two may have ended before its turn came.
    return fault.twice and not any(line["event"] == "fault" for line in lines)


def _leave_to_others(fault: Fault, broke: float | None) -> range:
    """Ranks of elastic training that end so that others go on: the half without rank 0."""
    if not (fault.is_elastic and fault.of_host) or broke is None:
        return range(0)
    return range(RANKS_OF_A_HOST, RANKS)


def _judge_error(outcome: Outcome, fault: Fault, rank: int, error: Line, broke: bool) -> None:
    kind, text = str(error["type"]), str(error["text"])
    outcome.usable.append(error.get("usable"))
    if not error["typed"]:
        outcome.count("untyped errors", f"rank {rank}: {kind}: {text[:300]}")
    elif not broke:
        outcome.count("wrong names", f"rank {rank}: an error without a fault: {kind}: {text[:300]}")
    elif kind == "Watchdog":
        pass  # MPI has not told who is missing
    elif kind not in _expected(fault) and not _passes_on(fault, kind, text):
        outcome.count("wrong names", f"rank {rank}: {kind}: {text[:300]}")
    elif not re.search(_victim_pattern(fault, rank), text):
        outcome.count("wrong names", f"rank {rank} does not name the victim: {text[:300]}")


def _expected(fault: Fault) -> tuple[str, ...]:
    expected = _EXPECTED.get(fault.kind, ())
    if fault.of_host and fault.phase == "start-up":
        return (*expected, "CommTimeoutError")  # hosts do not yet know each other
    if fault.kind == "stop" and fault.hosts > 1:
        return (*expected, "PeerLostError")  # MPI's own detector may take it for dead
    return expected


def _passes_on(fault: Fault, kind: str, text: str) -> bool:
    """Whether it is the end of a rank whose own error was the expected one, which it quotes."""
    quotes = any(expected in text for expected in _expected(fault))
    return kind == "PeerLostError" and "the job was ended by" in text and quotes


def _victim_pattern(fault: Fault, rank: int) -> str:
    """What an error on ``rank`` says of who is to blame."""
    if not fault.of_host:
        return rf"rank {fault.rank}\b"
    # Each side of a cut cable misses the other.
    lost = fault.host if rank not in fault.victims else 1 - fault.host
    ranks = "|".join(str(lost * RANKS_OF_A_HOST + i) for i in range(RANKS_OF_A_HOST))
    return rf"host 'host{lost}'|rank [\d, ]*\b({ranks})\b"


def _judge_waits_in_mpi(
    outcome: Outcome, reports: dict[int, list[Line]], broke: float | None
) -> None:
    """A rank that knows of the loss leaves MPI_Finalize soon, and says nothing.

    ``timeout_s`` is for one that was to find out there.
    """
    faults = [line["t"] for lines in reports.values() for line in lines if line["event"] == "fault"]
    latest = max([*faults, *([] if broke is None else [broke])], default=None)
    for rank, lines in sorted(reports.items()):
        ends = [line["t"] for line in lines if line["event"] == "end"]
        if not ends or not any(line["event"] == LEFT_MPI for line in lines):
            continue
        if latest is None:
            outcome.count("hangs", f"rank {rank} in MPI_Finalize, and there was no fault")
        elif latest < ends[0] - _UNNOTICED_S:
            before = f"{ends[0] - latest:.1f} s before it had done its work"
            outcome.count("hangs", f"rank {rank} in MPI_Finalize, for a rank lost {before}")


def _judge_exit_code(
    outcome: Outcome, fault: Fault, reports: dict[int, list[Line]], exit_code: int | None
) -> None:
    """0 if all ranks that could have done their work; 1 if one has failed."""
    if exit_code is None or (fault.of_host and outcome.happened):  # it has lost a daemon
        return
    judged = [lines for rank, lines in reports.items() if _is_judged(fault, rank, lines)]
    events = [{line["event"] for line in lines} for lines in judged]
    raised = fault.kind == "raise" and outcome.happened
    if raised or any("error" in of_rank for of_rank in events):
        if exit_code != 1:
            outcome.count("exit codes", f"{exit_code}, and a rank has failed")
    elif all("end" in of_rank for of_rank in events) and exit_code != 0:
        outcome.count("exit codes", f"{exit_code}, and all had done their work")


def _judge_commits(outcome: Outcome, reports: dict[int, list[Line]], broke: float | None) -> None:
    """What ranks commit at a step is the same for all, and none goes back behind a commit."""
    digests: dict[int, set[str]] = {}
    ends: set[int] = set()
    for rank, lines in sorted(reports.items()):
        latest = 0
        for line in lines:
            if line["event"] == "commit":
                digests.setdefault(line["step"], set()).add(line["digest"])
                latest = line["step"]
            elif line["event"] == "resume" and line["step"] < latest:
                outcome.count("wrong commits", f"rank {rank} went back from {latest}: {line}")
            elif line["event"] == "end":
                ends.add(line["step"])
    for step, found in digests.items():
        if len(found) > 1:
            outcome.count("wrong commits", f"step {step}: {len(found)} different states")
    if len(ends) > 1:
        outcome.count("wrong commits", f"ranks ended at steps {sorted(ends)}")
    if broke is not None:
        for lines in reports.values():
            times = [line["t"] for line in lines if line["event"] == "resume"]
            outcome.seconds += [t - broke for t in times if t > broke][:1]
