"""How a job ends that is to be started again."""

from __future__ import annotations

from typing import NoReturn

from pycomm import failure

START_AGAIN = 75
"""The exit code of ranks that want the job to be started again; it resumes from its folder.

EX_TEMPFAIL of sysexits.h: the job cannot go on now, and nothing is wrong with it.
"""


def leave(reason: str, folder: object) -> NoReturn:
    """End the job with ``START_AGAIN``, on all ranks for the same reason; one prints it."""
    where = f"it resumes from {folder}" if folder is not None else "it has no folder to resume from"
    failure.leave_job(
        START_AGAIN, f"{reason}\n  Start the job again: {where}. Exit code {START_AGAIN}."
    )
