"""One round: start the job, let the fault happen, wait for its end, and judge it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from chaos import processes, reports, shared_memory
from chaos.launch import started
from chaos.plan import Fault
from chaos.saved import judge_checkpoint
from chaos.verdict import Outcome, judge

JOB_TIMEOUT_S = 90.0  # after which a job counts as hanging
LEFT_BEHIND_S = 5.0  # for processes to go after the job has ended

_LOOK_S = 0.1


def run(fault: Fault, folder: Path) -> Outcome:
    """Run the job once with this fault; ``folder`` is empty."""
    outcome = Outcome(str(fault), fault.kind, fault.phase)
    before = shared_memory.names()
    with started(fault, folder) as launcher:
        try:
            if not _wait(launcher, fault, folder):
                outcome.count("hangs", f"still ran after {JOB_TIMEOUT_S:g} s")
            exit_code = launcher.poll()
            if exit_code is not None and (left := processes.left_after(str(folder), LEFT_BEHIND_S)):
                outcome.count("leaks", f"processes {left}")
        finally:
            launcher.kill()
            processes.end(str(folder))
            launcher.wait()
    for name in shared_memory.left_since(before):
        outcome.count("leaks", f"shared memory {name}")
    for path in folder.rglob("*.new"):
        outcome.count("leaks", f"file {path.name}")
    found = reports.read(folder)
    judge(outcome, fault, found, reports.broke_at(folder, fault, found), exit_code)
    judge_checkpoint(outcome, fault, folder, found)
    gone = fault.of_host == "power off" and fault.host == 1
    done = all(any(line["event"] == "end" for line in lines) for lines in found.values())
    leaves = fault.is_elastic and fault.of_host and outcome.happened and not (gone or done)
    if leaves and "Exit code 75" not in reports.output(folder):
        outcome.count("silent ranks", "the half without rank 0 did not say that it leaves")
    return outcome


def _wait(launcher: subprocess.Popen[bytes], fault: Fault, folder: Path) -> bool:
    """Whether the job ended in time."""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while time.monotonic() < deadline:
        if launcher.poll() is not None or _only_the_launcher_waits(fault, folder):
            return True
        time.sleep(_LOOK_S)
    return False


def _only_the_launcher_waits(fault: Fault, folder: Path) -> bool:
    """Whether all ranks have ended that can, and Open MPI's launcher may wait for ever.

    It does for its daemon on a lost host, and for a rank that was stopped when the others had done
    all their work: if they fail, it ends that one.
    """
    if fault.of_host:
        waits = (folder / reports.HOST_FILE).exists()
    else:
        waits = fault.kind == "stop" and reports.all_others_ended(folder, fault)
    return waits and not any(processes.running_ranks(str(folder)))
