"""The reductions of one backward pass, run by the thread that trains.

Inside a host whose cores all compute, a thread that reduces beside the training thread only takes
its core away (ADR 10). So what torch's reducer starts in backward (DistributedDataParallel) is
moved on whenever it starts the next one, as far as that goes without waiting, and brought to its
end when backward is over: before the reducer waits for it, by a callback that was queued with the
autograd engine earlier than the reducer's own.

Nobody else is promised that the thread comes by again: backward may raise, or compute for long. If
it has not for a while, a keeper goes on in its place.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import graph

from pycomm._core import Completions, Group, Turn
from pycomm.errors import PeerLostError

_engine: Any = torch.autograd.Variable._execution_engine
_ENGINE = graph._engine_run_backward.__code__
_PATIENCE_S = 0.5  # until the keeper takes over
_KEEPERS_PAUSE_S = 1e-3


def is_called_by_reducer(depth: int) -> bool:
    """Whether torch's C++ code called, from a hook of a backward pass of this thread.

    ``depth`` frames up is the autograd engine then. A hook in Python may wait for what it started
    at once, and so may a callback at the end of backward: they are not taken for the reducer.
    """
    try:
        caller = sys._getframe(depth + 1)
    except ValueError:  # a thread of the engine's own
        return False
    return caller.f_code is _ENGINE and torch._C._current_autograd_node() is not None


class Backward:
    """Holds the turn of an idle group of one host until its reductions are over."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._lock = threading.RLock()
        self._callbacks: list[Callable[[], None]] = []
        self._error: Exception | None = None
        self._interrupt: BaseException | None = None
        self._visited = time.monotonic()
        self.over = False
        # Of the innermost backward, as the reducer's own.
        _engine.queue_callback(self._end)
        _keeper.watch(self)

    @classmethod
    def begin(cls, group: Group) -> Backward | None:
        """None where a reduction has to go another way: other hosts, or the group is busy."""
        turn = group.take_turn()
        if turn is None:
            return None
        try:
            return cls(turn)
        except BaseException:
            turn.close()
            raise

    def all_reduce(self, *args: Any, **kwargs: Any) -> Reduction | None:
        """Start one, with the arguments of ``Turn.all_reduce``. None: this backward is over."""
        with self._lock:
            if self.over:
                return None
            self._turn.all_reduce(*args, **kwargs)
            self._visited = time.monotonic()
        return Reduction(self)

    def finish(self) -> None:
        """Bring all of them to their end and let the group go. What ended them: ``raise_error``."""
        with self._lock:
            callbacks = [] if self.over else self._close()
        self._call_back(callbacks)

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def when_over(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, which raises nothing, when they are over: at once, if they are."""
        with self._lock:
            if not self.over:
                self._callbacks.append(callback)
                return
        callback()

    def keep_going(self) -> None:
        """For the keeper: where the training thread should have come by, do what it would have."""
        if time.monotonic() - self._visited < _PATIENCE_S or not self._lock.acquire(blocking=False):
            return  # it was here a moment ago, or is now
        callbacks: list[Callable[[], None]] = []
        try:
            if not self.over:
                self._turn.advance()
                self._turn.check()
                if self._turn.done():
                    callbacks = self._close()
        finally:
            self._lock.release()
        self._call_back(callbacks)

    @property
    def is_late(self) -> bool:
        return not self.over and time.monotonic() - self._visited >= _PATIENCE_S

    def _end(self) -> None:
        """``backward()`` raises what ended a reduction; from the reducer it would hear less."""
        self.finish()
        self.raise_error()

    def _close(self) -> list[Callable[[], None]]:
        """Under the lock. Returns what is to be called without it."""
        try:
            self._turn.wait()
        except Exception as error:  # for those who wait for a reduction
            self._error = error
        except BaseException as error:  # Ctrl-C: for this thread alone
            self._interrupt = error
            self._error = PeerLostError("interrupted while reducing what backward had started.")
        self._turn.close()
        self.over = True
        callbacks, self._callbacks = self._callbacks, []
        return callbacks

    def _call_back(self, callbacks: list[Callable[[], None]]) -> None:
        for callback in callbacks:
            callback()
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt


class Reduction:
    """One of a backward's, as a ``CoreWork``. They are over together."""

    def __init__(self, backward: Backward) -> None:
        self.backward = backward

    def wait(self) -> None:
        self.backward.finish()
        self.backward.raise_error()

    def done(self) -> bool:
        return self.backward.over

    def settled(self) -> bool:
        return self.backward.over

    def order_before(self, current_stream: Callable[[int], int]) -> None:
        """It is on the host."""

    def announce_to(self, completions: Completions, ticket: int) -> None:
        raise NotImplementedError("the end of a backward calls back by itself: when_over()")

    seconds = 0.0  # not measured


class _Keeper:
    """A thread that looks after backwards whose training thread does not come by."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: list[Backward] = []
        self._thread: threading.Thread | None = None

    def watch(self, backward: Backward) -> None:
        with self._changed:
            self._open.append(backward)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pycomm keeper", daemon=True)
                self._thread.start()
            elif len(self._open) == 1:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._open = [backward for backward in self._open if not backward.over]
                while not self._open:
                    self._changed.wait()
                opened = list(self._open)
            for backward in opened:
                backward.keep_going()
            late = any(backward.is_late for backward in opened)
            del opened, backward
            time.sleep(_KEEPERS_PAUSE_S if late else _PATIENCE_S)


_keeper = _Keeper()


def _forget() -> None:
    """In a forked child, which has no keeper, and nothing to keep."""
    global _keeper
    _keeper = _Keeper()


os.register_at_fork(after_in_child=_forget)
