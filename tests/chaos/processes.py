"""The processes of a round: found by a variable in their environment, so that none is forgotten."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "CHAOS_ROUND"


_ENDED = "ZX"  # states in /proc/PID/stat
_STOPPED = "Tt"


def of_round(value: str, but: str = _ENDED) -> Iterator[int]:
    """Process ids; of those that can still do something.

    Args:
        but: states that do not count.
    """
    marker = f"{VARIABLE}={value}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (process / "stat").read_text().rpartition(") ")[2][:1]
            environ = (process / "environ").read_bytes().split(b"\0")
            if marker in environ and state not in but:
                yield int(process.name)


def running_ranks(value: str) -> Iterator[int]:
    """Those of them that are ranks of the job, and not what starts it; without stopped ones."""
    for pid in of_round(value, _ENDED + _STOPPED):
        with contextlib.suppress(OSError):
            if (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[1:2] == [b"-m"]:
                yield pid


def left_after(value: str, within_s: float) -> list[int]:
    """Those of the round that are still there after so long."""
    deadline = time.monotonic() + within_s
    while True:
        left = list(of_round(value))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def end(value: str) -> None:
    """End them, stopped ones too."""
    for pid in list(of_round(value)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
