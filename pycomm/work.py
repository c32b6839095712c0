"""A collective in flight."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pycomm import _core

T = TypeVar("T")

# Memory of operations that run on although nobody holds their Work any more.
_abandoned: dict[_core.Work, object] = {}


class Work(Generic[T]):
    """What a collective returns with ``async_op=True``: ``wait()`` before touching its tensors.

    The tensors stay alive until the operation is over, even if the ``Work`` is dropped.
    """

    __slots__ = ("_core_work", "_finish", "_result", "_tensors", "_waited")

    def __init__(self, core_work: _core.Work, tensors: object, finish: Callable[[], T]) -> None:
        for over in [work for work in tuple(_abandoned) if work.done()]:
            _abandoned.pop(over, None)
        self._core_work = core_work
        self._tensors = tensors
        self._finish = finish
        self._result: Any = None
        self._waited = False

    def wait(self) -> T:
        """Block until the operation is over; return what the blocking call would have returned.

        Raises:
            MismatchError, CommTimeoutError, PeerLostError: as the blocking call would have. May
                be called again, and then returns or raises the same.
        """
        self._core_work.wait()
        if not self._waited:
            self._result = self._finish()
            self._waited = True
        result: T = self._result
        return result

    def done(self) -> bool:
        """Whether ``wait()`` would return or raise at once."""
        return self._core_work.done()

    @property
    def seconds(self) -> float:
        """Seconds the operation took from its start to its end; valid once ``done()``."""
        return self._core_work.seconds

    def __del__(self) -> None:
        # __init__ may not have got this far.
        core_work = getattr(self, "_core_work", None)
        if core_work is not None and not core_work.done():
            _abandoned[core_work] = self._tensors
