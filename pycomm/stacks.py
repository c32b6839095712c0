"""What this process is doing, for ranks that wait for it.

``faulthandler`` writes the stacks of all Python threads when a signal comes: its handler is C code
that needs neither Python's lock nor a thread that still runs Python. The file is memory without a
name; a peer opens it through ``/proc`` as long as it runs as the same user.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from typing import NamedTuple


class Offer(NamedTuple):
    """Send ``signal`` to this process, and the stacks are added to the file ``descriptor``."""

    signal: int
    descriptor: int


_offer: Offer | None = None


def offer() -> Offer | None:
    """Begin to answer, once a process; None if every real-time signal is taken."""
    global _offer
    if _offer is None:
        number = _free_signal()
        if number is None:
            return None
        descriptor = os.memfd_create("pycomm-stacks", os.MFD_CLOEXEC)
        faulthandler.register(number, file=descriptor, all_threads=True, chain=False)
        _offer = Offer(number, descriptor)
    return _offer


def _free_signal() -> int | None:
    """A real-time signal that nobody handles, the latest first: C libraries take the earliest."""
    numbers = range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1)
    return next((number for number in numbers if _handled_by_nobody(number)), None)


def _handled_by_nobody(number: int) -> bool:
    # What C code has installed shows here only; Python's own view is None then, or out of date.
    with open("/proc/self/status") as status:
        masks = dict(line.split(":", 1) for line in status)
    taken = int(masks["SigCgt"], 16) | int(masks["SigIgn"], 16) | int(masks["SigBlk"], 16)
    return not taken >> (number - 1) & 1
