"""The threads that learn from the core which operations are over, and settle their futures."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from collections.abc import Callable
from typing import Protocol

from pycomm._core import Completions


class Announced(Protocol):
    """What tells the core's ``Completions`` of its end."""

    def announce_to(self, completions: Completions, ticket: int) -> None: ...


class Settler:
    """Calls back, in a thread of its own, when operations are over.

    A thread blocks in the core, without Python's lock, and wakes once for all that ended meanwhile.
    A callback may run what users chained to a future, and that may wait for another operation
    (PowerSGD's hook does): so whoever calls back leaves a thread behind that goes on listening.
    """

    def __init__(self) -> None:
        self._completions = Completions()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._tickets = itertools.count()
        self._lock = threading.Lock()
        self._listening = 0
        self._threads: list[threading.Thread] = []
        self._closed = False

    def watch(self, work: Announced, callback: Callable[[], None]) -> None:
        """Call ``callback``, which raises nothing and may wait for ``work``, when that is over.

        At the end of the process, when no thread listens any more, the caller waits.
        """
        if self._closed:
            callback()
            return
        ticket = next(self._tickets)
        self._callbacks[ticket] = callback
        work.announce_to(self._completions, ticket)
        if not self._threads:
            with self._lock:
                if not self._threads:
                    self._begin_thread()

    def close(self) -> None:
        """Settle what is over and end the threads."""
        self._closed = True
        self._completions.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=1.0)

    def _begin_thread(self) -> None:
        """Holds the lock."""
        thread = threading.Thread(target=self._listen, name="pycomm completions", daemon=True)
        self._listening += 1
        self._threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        while tickets := self._completions.next():
            with self._lock:
                self._listening -= 1
                if self._listening == 0:
                    self._begin_thread()
            for ticket in tickets:
                callback = self._callbacks.pop(ticket)
                callback()
                del callback  # what it holds must not wait for the next
            with self._lock:
                self._listening += 1


_settler: Settler | None = None


def settler() -> Settler:
    """The process's; a forked child, where none of its threads run, gets one of its own."""
    global _settler
    if _settler is None:
        _settler = Settler()
        atexit.register(_close)
    return _settler


def _close() -> None:
    if _settler is not None:
        _settler.close()


def _forget() -> None:
    global _settler
    _settler = None


os.register_at_fork(after_in_child=_forget)
