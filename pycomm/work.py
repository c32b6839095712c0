"""A collective in flight."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from pycomm import device
from pycomm._core import Completions

T = TypeVar("T")


class CoreWork(Protocol):
    """What the core returns for an operation in flight; ``_core.pyi`` says what each does."""

    def wait(self) -> None: ...
    def done(self) -> bool: ...
    def settled(self) -> bool: ...
    def order_before(self, current_stream: Callable[[int], int]) -> None: ...
    def announce_to(self, completions: Completions, ticket: int) -> None: ...
    @property
    def seconds(self) -> float: ...


# Memory of operations that run on although nobody holds their Work any more.
_abandoned: dict[CoreWork, object] = {}


def keep_until_settled(core_work: CoreWork, memory: object) -> None:
    """Nobody waits for the operation any more: its memory must outlive it, on a GPU too."""
    _forget_settled()
    if not core_work.settled():
        _abandoned[core_work] = memory


def _forget_settled() -> None:
    for over in [work for work in tuple(_abandoned) if work.settled()]:
        _abandoned.pop(over, None)


class Work(Generic[T]):
    """What a collective returns with ``async_op=True``: ``wait()`` before touching its tensors.

    The tensors stay alive until the operation is over, even if the ``Work`` is dropped.
    """

    __slots__ = ("_core_work", "_finish", "_result", "_tensors", "_waited")

    def __init__(self, core_work: CoreWork, tensors: object, finish: Callable[[], T]) -> None:
        if _abandoned:
            _forget_settled()
        self._core_work = core_work
        self._tensors = tensors
        self._finish = finish
        self._result: Any = None
        self._waited = False

    def wait(self) -> T:
        """Block until the operation is over; return what the blocking call would have returned.

        On a GPU the operation is over once it was launched: the caller's current stream then waits
        for the GPU, and the host does not.

        Raises:
            MismatchError, CommTimeoutError, PeerLostError: as the blocking call would have. May
                be called again, and then returns or raises the same.
        """
        self._core_work.wait()
        self._core_work.order_before(device.current_stream)
        if not self._waited:
            self._result = self._finish()
            self._waited = True
        result: T = self._result
        return result

    @property
    def core_work(self) -> CoreWork:
        """The operation without what is to be done at its end."""
        return self._core_work

    def done(self) -> bool:
        """Whether ``wait()`` would return or raise at once."""
        return self._core_work.done()

    def announce_to(self, completions: Completions, ticket: int) -> None:
        """Note ``ticket`` there when the operation is over, at once if it is. Called once."""
        self._core_work.announce_to(completions, ticket)

    @property
    def seconds(self) -> float:
        """Seconds the operation took from its start to its end; valid once ``done()``."""
        return self._core_work.seconds

    def __del__(self) -> None:
        # __init__ may not have got this far.
        core_work = getattr(self, "_core_work", None)
        if core_work is not None and not core_work.settled():
            _abandoned[core_work] = self._tensors


class Together:
    """Several operations of one group as one; they end in the order they were started."""

    def __init__(self, works: Sequence[CoreWork]) -> None:
        self._works = tuple(works)

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def done(self) -> bool:
        return all(work.done() for work in self._works)

    def settled(self) -> bool:
        return all(work.settled() for work in self._works)

    def order_before(self, current_stream: Callable[[int], int]) -> None:
        for work in self._works:
            work.order_before(current_stream)

    def announce_to(self, completions: Completions, ticket: int) -> None:
        self._works[-1].announce_to(completions, ticket)

    @property
    def seconds(self) -> float:
        return sum(work.seconds for work in self._works)


def outcome(core_work: CoreWork | None, tensors: object, finish: Callable[[], T]) -> T | Work[T]:
    """What a call returns: its result if it was blocking, else the ``Work`` that returns it."""
    return finish() if core_work is None else Work(core_work, tensors, finish)


def nothing() -> None:
    """The result of a call that writes into tensors it was given."""
