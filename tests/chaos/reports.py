"""What is noted in the folder of a round, by its ranks and by whoever breaks its hosts."""

from __future__ import annotations

import re
from pathlib import Path

import journal
from journal import Line

from chaos.plan import RANKS, Fault

HOST_FILE = "host-broke"  # holds when
_OF_MPI = re.compile(r"MPI_ERRORS_ARE_FATAL|Segmentation fault.*MPI_Comm_dup", re.DOTALL)
LEFT_MPI = "left MPI"  # the event of a rank whose wait in MPI_Finalize came to its bound


def read(folder: Path) -> dict[int, list[Line]]:
    """The lines of each rank; a rank that never wrote has none."""
    found: dict[int, list[Line]] = {rank: journal.read(folder, rank) for rank in range(RANKS)}
    # A rank that MPI_Init holds cannot write anything: it ends with words of the core, or, if the
    # others have ended so just before, of MPI. Open MPI crashes, and shows where, if it notices a
    # loss in MPI_Comm_dup, the last that init() does before hosts know each other.
    for match in re.finditer(r"init on rank (\d+): MPI did not start within.*", output(folder)):
        found[int(match[1])].append(_held_by_mpi(match[0]))
    for rank, lines in found.items():
        words = folder / f"rank-{rank}.stderr"
        in_start_up = [line["event"] for line in lines] == ["phase"]
        if in_start_up and _OF_MPI.search(words.read_text(errors="replace")):
            lines.append(_held_by_mpi(words.read_text(errors="replace")))
    # Once one has ended so, the launcher may end the others before their time.
    if any(line.get("type") == "Watchdog" for lines in found.values() for line in lines):
        for lines in found.values():
            if [line["event"] for line in lines] == ["phase"]:
                lines.append(_held_by_mpi("ended by the launcher while MPI started"))
    for rank in left_mpi(output(folder)):
        found[rank].append({"event": LEFT_MPI, "t": None})
    return found


def left_mpi(words: str) -> list[int]:
    """Ranks that have said that they wait no longer in MPI_Finalize."""
    found = re.findall(r"rank (\d+) of \d+ on \S+ has ended, has waited \d+ s in MPI_Fin", words)
    return sorted({int(rank) for rank in found})


def _held_by_mpi(text: str) -> Line:
    return {"event": "error", "type": "Watchdog", "typed": True, "text": text, "t": None}


def output(folder: Path) -> str:
    """What mpirun printed, and what ranks wrote to stderr."""
    files = [folder / "output", *sorted(folder.glob("rank-*.stderr"))]
    return "\n".join(file.read_text(errors="replace") for file in files)


def broke_at(folder: Path, fault: Fault, reports: dict[int, list[Line]]) -> float | None:
    """When the fault happened; None: it did not."""
    host = folder / HOST_FILE
    if host.exists():
        return float(host.read_text())
    times = [line["t"] for line in reports[fault.rank] if line["event"] == "fault"]
    return float(times[0]) if times else None


def all_others_ended(folder: Path, fault: Fault) -> bool:
    """Whether every rank but the victims has done all its work."""
    return all(
        any(line["event"] == "end" for line in journal.read(folder, rank))
        for rank in range(RANKS)
        if rank not in fault.victims
    )


def phase_has_begun(folder: Path, fault: Fault) -> bool:
    return any(line.get("phase") == fault.phase for line in journal.read(folder, fault.rank))
