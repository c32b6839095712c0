"""The checkpoint that a broken job leaves: a whole one, and one that the next save can replace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from journal import Line
from launchers import TIMEOUT_S, process_options

import pycomm
from chaos.job import CHECKPOINT, SAVED
from chaos.plan import Fault
from chaos.verdict import Outcome

# What pycomm.checkpoint leaves beside it if it is killed: `folder.py` there.
_BESIDE = (f"{CHECKPOINT}.unfinished", f"{CHECKPOINT}.replaced")

_SAVE = """
import pycomm, sys
pycomm.init()
pycomm.checkpoint.save(sys.argv[1], {"number": -1})
assert pycomm.checkpoint.read(sys.argv[1]) == {"number": -1}
"""


def judge_checkpoint(
    outcome: Outcome, fault: Fault, folder: Path, reports: dict[int, list[Line]]
) -> None:
    """Count one that is not whole, is an older one, or holds something else."""
    lines = [line for of_rank in reports.values() for line in of_rank]
    latest = max((line["number"] for line in lines if line["event"] == "saved"), default=-1)
    if latest >= 0 or pycomm.checkpoint.exists(folder / CHECKPOINT):
        _judge_content(outcome, folder / CHECKPOINT, latest)
    beside = [name for name in _BESIDE if (folder / name).exists()]
    if beside and not (outcome.happened and fault.phase == "checkpoint"):
        outcome.count("leaks", f"{beside}, and no save was broken")
    elif beside:
        _judge_next_save(outcome, folder, beside)


def _judge_content(outcome: Outcome, place: Path, latest: int) -> None:
    """A save after the ``latest`` that has returned may have put its checkpoint in place."""
    try:
        found = pycomm.checkpoint.read(place)
    except pycomm.CommError as error:
        outcome.count("leaks", f"no whole checkpoint: {error}")
        return
    if found["number"] not in (latest, latest + 1):
        outcome.count("wrong sums", f"checkpoint {found['number']}, and {latest} was saved")
    if not torch.equal(found["state"], SAVED):
        outcome.count("wrong sums", f"checkpoint: {found['state']}")


def _judge_next_save(outcome: Outcome, folder: Path, beside: list[str]) -> None:
    """It takes what the broken one left."""
    command = [sys.executable, "-c", _SAVE, str(folder / CHECKPOINT)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, **process_options())
    if done.returncode != 0:
        outcome.count("leaks", f"{beside}, and the next save: {done.stderr}")
    left = [name for name in _BESIDE if (folder / name).exists()]
    if left:
        outcome.count("leaks", f"{left} after the next save")
