"""What torch gets back for an operation: its ``Work``, and its ``Future`` if it asks for one."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from pycomm import work as pycomm_work
from pycomm.errors import CommTimeoutError
from pycomm.torch_backend.backward import Reduction, is_called_by_reducer
from pycomm.torch_backend.completions import settler
from pycomm.torch_backend.tensors import Delivery, tensors_in

_POLL_S = 1e-3  # of a wait with a timeout of its own

# PyTorch 2.6 lets go of the Python object when only C++ holds a Work (functional collectives do),
# and its wait() then blocks for ever. So it is kept here until somebody has waited or its future is
# settled, and a little longer: a coalesced operation is waited for once for each of its tensors.
# Later versions keep the object themselves (pytorch/pytorch#146376), and shut groups down.
_TORCH_LOSES_WORKS = not hasattr(dist.ProcessGroup, "shutdown")
_kept: set[dist.Work] = set()
_waited_for: collections.deque[dist.Work] = collections.deque(maxlen=64)


def _keep(work: dist.Work) -> None:
    if _TORCH_LOSES_WORKS:
        _kept.add(work)


def _keep_no_longer(work: dist.Work) -> None:
    if work in _kept:
        _kept.discard(work)
        _waited_for.append(work)


class Work(dist.Work):
    """An operation in flight, as torch's C++ and Python code know it.

    ``wait`` blocks in the core, in the thread that calls it. A ``Future`` is made for who asks
    (DDP's reducer waits on nothing else): a thread of ``completions`` settles it, with the result
    or with the error that a wait would have raised.
    """

    def __init__(self, work: pycomm_work.Work[Any], result: list[Any]) -> None:
        super().__init__()
        self._work = work
        self._result = result
        self._lock = threading.Lock()  # of what is done once, after the end
        self._future: Future[Any] | None = None
        self._span: Future[Any] | None = None
        _keep(self)

    def note_span(self, ended: Future[Any]) -> None:
        """``ended`` is settled after the profiler's range has: who has waited may stop profiling.

        A range that ends after the profiler has would end the process.
        """
        self._span = ended

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the operation is over; on a GPU, until the current stream waits for it.

        Raises:
            CommTimeoutError: ``timeout`` is over, and the operation goes on; or its own time is.
            MismatchError, PeerLostError: what ended it.
        """
        if timeout is not None and timeout > timedelta(0):
            self._wait_at_most(timeout.total_seconds())
        try:
            with self._lock:
                self._work.wait()
        finally:
            _keep_no_longer(self)
            if self._span is not None:
                self._await_span(self._span)
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        """Its results are there, too."""
        if not self._work.done():
            return False
        if isinstance(self._work, Delivery):
            self._ended_by()
        return True

    def is_success(self) -> bool:
        return self._work.done() and self._ended_by() is None

    def exception(self) -> Exception | None:
        """What ended the operation; None while it is under way, too."""
        return self._ended_by() if self._work.done() else None

    def result(self) -> list[Any]:
        """The tensors that it writes, as they were given."""
        return self._result

    def source_rank(self) -> int:
        """Of a receive that is over: the rank of the group whose message it was."""
        with self._lock:
            source: int = self._work.wait()
        return source

    _source_rank = source_rank

    def get_future(self) -> Future[Any]:
        """Settled with ``result()`` when the operation is over; on GPUs, in stream order.

        Asked for by a hook of a backward pass (DDP's communication hooks), it is settled already:
        what the hook chains to it then runs there and then, in the order of the buckets, and may
        communicate. Elsewhere two ranks might issue that in different orders.
        """
        in_backward = torch._C._current_autograd_node() is not None
        if in_backward and not is_called_by_reducer(1):
            self._ended_by()
            with contextlib.suppress(Exception):  # what ended it: for who asks the future
                self.future().wait()
        return self.future()

    def future(self) -> Future[Any]:
        """The same, as it is: for this package."""
        if self._future is None:
            devices = sorted(
                {t.device for t in tensors_in(self._result) if t.is_cuda}, key=lambda d: d.index
            )
            settled: Future[Any] = Future(devices=[*devices])
            # Future.set_exception ends the process in DDP's reducer; what `then` raises does not.
            self._future = settled.then(_unwrap)
            if self._work.done():
                self._settle(settled, devices)
            else:
                self._when_over(lambda: self._settle(settled, devices))
        return self._future

    def get_future_result(self) -> Future[Any]:
        return self.get_future()

    def _when_over(self, callback: Callable[[], None]) -> None:
        core_work = self._work.core_work
        if isinstance(core_work, Reduction):
            core_work.backward.when_over(callback)
        else:
            settler().watch(core_work, callback)

    def _settle(self, settled: Future[Any], devices: list[torch.device]) -> None:
        with _streams_of_their_own(devices):
            error = self._ended_by()
            if isinstance(self._work, Delivery):  # who waits for the operation knows no stream here
                for device in devices:
                    torch.cuda.current_stream(device).synchronize()
            settled.set_result(self._result if error is None else error)

    def _await_span(self, span: Future[Any]) -> None:
        core_work = self._work.core_work
        if isinstance(core_work, Reduction):
            core_work.backward.finish()  # which settles it
        with contextlib.suppress(RuntimeError):  # what ended the operation, once more
            span.wait()

    def _ended_by(self) -> Exception | None:
        try:
            with self._lock:
                self._work.wait()
        except Exception as error:  # whatever ended it
            return error
        return None

    def _wait_at_most(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._work.done():
            if time.monotonic() > deadline:
                raise CommTimeoutError(
                    f"wait: timed out after {timeout_s:g} s; the operation goes on.\n"
                    "  Wait again, or give wait() no timeout: the operation has its own.",
                    group_usable=True,
                )
            time.sleep(_POLL_S)


class Works(dist.Work):
    """Several operations as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        """As each one's; ``timeout`` is for all of them together."""
        start = time.monotonic()
        for work in self._works:
            if timeout is None or timeout <= timedelta(0):
                work.wait()
            else:
                left = timeout - timedelta(seconds=time.monotonic() - start)
                work.wait(max(left, timedelta.resolution))
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def exception(self) -> Exception | None:
        return next(filter(None, (work.exception() for work in self._works)), None)

    def result(self) -> list[Any]:
        return [work.result() for work in self._works]

    def get_future(self) -> Future[Any]:
        all_of_them = torch.futures.collect_all([work.get_future() for work in self._works])
        return all_of_them.then(lambda over: [future.value() for future in over.value()])


class DoneWork(dist.Work):
    """For a torch that asks even a blocking call for its ``Work``."""

    def __init__(self, result: list[Any], source: int = -1) -> None:
        super().__init__()
        self._result = result
        self._source = source
        _keep(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        _keep_no_longer(self)
        return True

    def synchronize(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[Any]:
        return self._result

    def get_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._result)
        return future


def _unwrap(settled: Future[Any]) -> Any:
    value = settled.value()
    if isinstance(value, Exception):
        raise value
    return value


@contextlib.contextmanager
def _streams_of_their_own(devices: list[torch.device]) -> Iterator[None]:
    """What settles a future must not hold up a stream on which somebody computes.

    A future of CUDA tensors notes the current streams when it is settled, and who waits for it
    waits for those.
    """
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        yield
