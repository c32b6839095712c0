"""SIGUSR1: finish the step, write a checkpoint and leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Preemption:
    """Whether this rank was told to leave. One rank is enough: commits tell the others."""

    def __init__(self) -> None:
        self.requested = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Catch the signal meanwhile. Python hears it in the main thread alone: elsewhere nothing
        is caught, and the signal ends the process as it always does.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGUSR1, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, previous)
