"""One round: start the job, let the fault happen, wait for its end, and judge it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from chaos import processes, reports
from chaos.launch import started
from chaos.plan import Fault
from chaos.verdict import Outcome, judge

JOB_TIMEOUT_S = 90.0  # after which a job counts as hanging
MPI_FINALISES_S = 10.0  # after which MPI_Finalize is held to wait for ever for who is lost
LEFT_BEHIND_S = 5.0  # for processes to go after the job has ended

_LOOK_S = 0.1


def run(fault: Fault, folder: Path) -> Outcome:
    """Run the job once with this fault; ``folder`` is empty."""
    outcome = Outcome(str(fault), fault.kind, fault.phase)
    before = _shared_memory()
    with started(fault, folder) as launcher:
        try:
            if not _wait(launcher, fault, folder):
                outcome.count("hangs", f"still ran after {JOB_TIMEOUT_S:g} s")
            elif launcher.poll() is not None and (
                left := processes.left_after(str(folder), LEFT_BEHIND_S)
            ):
                outcome.count("leaks", f"processes {left}")
        finally:
            launcher.kill()
            processes.end(str(folder))
            launcher.wait()
    for path in sorted(_shared_memory() - before):
        if "pycomm" in path:
            outcome.count("leaks", f"shared memory {path}")
    for path in folder.rglob("*.new"):
        outcome.count("leaks", f"file {path.name}")
    found = reports.read(folder)
    judge(outcome, fault, found, reports.broke_at(folder, fault, found))
    gone = fault.of_host == "power off" and fault.host == 1
    leaves = fault.is_elastic and fault.of_host and outcome.happened and not gone
    if leaves and "Exit code 75" not in reports.output(folder):
        outcome.count("silent ranks", "the half without rank 0 did not say that it leaves")
    return outcome


def _wait(launcher: subprocess.Popen[bytes], fault: Fault, folder: Path) -> bool:
    """Whether the job ended in time."""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    patient_until = deadline
    while time.monotonic() < deadline:
        if launcher.poll() is not None:
            return True
        # Open MPI's launcher waits for its daemon on a lost host for ever.
        if not reports.only_mpi_is_left(folder, fault):
            patient_until = time.monotonic() + MPI_FINALISES_S
        elif time.monotonic() > patient_until:
            return True
        host_broke = fault.of_host and (folder / reports.HOST_FILE).exists()
        if host_broke and not any(processes.ranks_of_round(str(folder))):
            launcher.kill()
            launcher.wait()
            processes.end(str(folder))
            return True
        time.sleep(_LOOK_S)
    return False


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
