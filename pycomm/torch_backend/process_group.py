"""``torch.distributed.ProcessGroup`` over a group of the core.

Torch reaches a process group from Python (``dist.all_reduce``) and from C++ (DDP's reducer,
functional collectives), by the same names and with the same options. Each method here says which
operation that is, runs it in the calling thread if the caller is going to wait anyway, and else
returns the ``Work``. Names and signatures are torch's, those of older versions beside the newest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ReduceScatterOptions,
    ScatterOptions,
)

from pycomm import tensor_calls
from pycomm import work as pycomm_work
from pycomm._core import Group, ReduceOp
from pycomm.arguments import refuse
from pycomm.errors import NotInitializedError
from pycomm.torch_backend import membership, messages, moves, reductions
from pycomm.torch_backend.backward import Backward, is_called_by_reducer
from pycomm.torch_backend.fallback import Fallback
from pycomm.torch_backend.monitored_barrier import MonitoredBarrier
from pycomm.torch_backend.options import (
    SAYS_ASYNC,
    as_lists,
    core_op,
    is_asynchronous,
    options_in,
)
from pycomm.torch_backend.tensors import Delivery, tensors_in, together
from pycomm.torch_backend.work import DoneWork, Work, Works

NAME = "pycomm"

_SUM: Any = dist.ReduceOp.SUM
_CORE_SUM = ReduceOp.SUM  # looking a member up takes as long as adding
_all_reduce: Callable[..., bool] = tensor_calls.all_reduce
_profiler_enabled = torch.autograd._profiler_enabled
_NO_TIME = timedelta(0)
_OPTIONS_OF_ANY_BACKEND = dist.ProcessGroupGloo._Options.__bases__[0]

Tensors = Sequence[Tensor]
Lists = Sequence[Sequence[Tensor]]
Method = TypeVar("Method", bound=Callable[..., Any])


def _ranged(name: str) -> Callable[[Method], Method]:
    """Show a method to torch's profiler as ``pycomm:name``, up to the operation's end."""

    def decorate(method: Method) -> Method:
        label = f"{NAME}:{name}"

        @functools.wraps(method)
        def call(self: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if not _profiler_enabled():
                return method(self, *args, **kwargs)
            with torch.profiler.record_function(label) as span:
                work = method(self, *args, **kwargs)
                if isinstance(work, Work):
                    work.note_span(span._call_end_callbacks_on_future(work.future()))
                return work

        return cast("Method", call)

    return decorate


class ProcessGroup(dist.ProcessGroup):
    """The ranks of ``init_process_group("pycomm")``, or of a ``new_group`` of them.

    Operations run in the order in which they were issued; messages keep an order of their own, for
    each peer, and wait for no collective. An error other than ``InvalidArgumentError`` finishes the
    group: every later call raises it, on every rank.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta,
        torch_ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(rank, size)
        self._timeout_s = timeout.total_seconds()
        self._has_own_timeout = False  # another than the core's group, whose it was first
        member = membership.join(store, rank, size, self._timeout_s, torch_ranks)
        self._store = member.store
        self._check_present = member.check_present
        self._group: Group | None = member.group  # None once it was destroyed
        self._leave = member.leave
        self._backward: Backward | None = None  # the last one with reductions of torch's reducer
        self._undelivered: dict[Work, set[int]] = {}  # and the memory they write
        self._barriers = 0
        self._coalesced: list[Work] | None = None  # what was started since _start_coalescing()
        # Kept, or torch would only find the C++ part of it.
        self._fallback = Fallback(
            member.store,
            rank,
            size,
            timeout,
            self._set_timeout,
            several_hosts=len(member.group.hosts) > 1,
        )
        for device in ("cpu", "cuda"):
            self._register_backend(
                torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, self._fallback
            )
        self._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)

    @property
    def core(self) -> Group:
        """The core's group, for a collective: what torch's reducer has started comes first."""
        self._end_backward()
        return self.mail

    @property
    def mail(self) -> Group:
        """The core's group, for a message, which waits for no collective."""
        if self._group is None:
            raise NotInitializedError(
                f"rank {self.rank()}: this process group was destroyed.\n"
                "  Make a new one: init_process_group() or new_group()."
            )
        return self._group

    def _end_backward(self) -> None:
        if self._backward is not None:
            self._backward.finish()
            self._backward = None

    def getBackendName(self) -> str:  # noqa: N802
        return NAME

    def name(self) -> str:
        return NAME

    def set_timeout(self, timeout: timedelta) -> None:
        """Of operations from now on. ``torch.distributed.set_timeout``, from PyTorch 2.14 on."""
        self._fallback._set_default_timeout(timeout)  # which sets this group's, too

    def __repr__(self) -> str:
        return f"<pycomm ProcessGroup, rank {self.rank()} of {self.size()}>"

    # --- reductions ------------------------------------------------------------------------------

    def allreduce(self, tensors: Tensors, opts: Any = None, *given: Any, **named: Any) -> Any:
        # Most of the time of a small reduction would go into finding out what to do: the ordinary
        # one, a sum of one tensor that needs no preparation, is recognised first.
        if (
            type(opts) is AllreduceOptions
            and SAYS_ASYNC
            and not opts.asyncOp
            and self._backward is None
            and not self._undelivered
            and self._group is not None
            and not self._has_own_timeout
            and opts.reduceOp == _SUM
            and opts.timeout < _NO_TIME
            and not _profiler_enabled()
            and len(tensors) == 1
            and _all_reduce(self._group, tensors[0], tensors[0], _CORE_SUM)
        ):
            return None
        in_backward = is_called_by_reducer(1)
        return self._allreduce(in_backward, tensors, opts, *given, **named)

    @_ranged("all_reduce")
    def _allreduce(self, in_backward: bool, tensors: Tensors, *given: Any, **named: Any) -> Any:
        opts = options_in(AllreduceOptions, given, named)
        (tensors,) = as_lists(tensors)
        group = self.mail
        op, scale = core_op("all_reduce", opts, group)
        if in_backward and _fits_backward(tensors):
            if self._backward is None or self._backward.over:
                self._backward = Backward.begin(group)
            if self._backward is not None:
                work = reductions.all_reduce(
                    tensors, op, scale, group, self._timeout_of(opts), True, self._backward
                )
                return _over(tensors) if work is None else Work(work, list(tensors))
        return self._run(reductions.all_reduce, tensors, op, scale, opts=opts, result=tensors)

    @_ranged("all_reduce")
    def allreduce_coalesced(self, tensors: Tensors, *given: Any, **named: Any) -> Any:
        opts = options_in(AllreduceCoalescedOptions, given, named)
        op = core_op("all_reduce_coalesced", opts, self.mail)
        return self._run_all(
            [functools.partial(reductions.all_reduce, [t], *op) for t in tensors],
            opts=opts,
            result=tensors,
        )

    @_ranged("reduce")
    def reduce(self, tensors: Tensors, *given: Any, **named: Any) -> Any:
        opts = options_in(ReduceOptions, given, named)
        (tensors,) = as_lists(tensors)
        return self._run(
            reductions.reduce,
            tensors,
            opts.rootRank,
            *core_op("reduce", opts, self.mail),
            opts=opts,
            result=tensors,
        )

    @_ranged("reduce_scatter")
    def reduce_scatter(
        self,
        outputs: Tensors,
        inputs: Lists,
        *given: Any,
        **named: Any,
    ) -> Any:
        opts = options_in(ReduceScatterOptions, given, named)
        return self._run(
            reductions.reduce_scatter,
            outputs,
            inputs,
            *core_op("reduce_scatter", opts, self.mail),
            opts=opts,
            result=outputs,
        )

    @_ranged("reduce_scatter")
    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, *given: Any, **named: Any
    ) -> Any:
        opts = options_in(ReduceScatterOptions, given, named)
        return self._run(
            reductions.reduce_scatter_single,
            output,
            input,
            *core_op("reduce_scatter_single", opts, self.mail),
            opts=opts,
            result=[output],
        )

    @_ranged("reduce_scatter")
    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, *given: Any, **named: Any
    ) -> Any:
        opts = options_in(ReduceScatterOptions, given, named)
        op = core_op("reduce_scatter_single_coalesced", opts, self.mail)
        return self._run_all(
            [
                functools.partial(reductions.reduce_scatter_single, output, input, *op)
                for output, input in self._pairs("reduce_scatter_single_coalesced", outputs, inputs)
            ],
            opts=opts,
            result=outputs,
        )

    # --- moves -----------------------------------------------------------------------------------

    @_ranged("broadcast")
    def broadcast(self, tensors: Tensors, *given: Any, **named: Any) -> Any:
        opts = options_in(BroadcastOptions, given, named)
        (tensors,) = as_lists(tensors)
        return self._run(moves.broadcast, tensors, opts.rootRank, opts=opts, result=tensors)

    @_ranged("all_gather")
    def allgather(
        self,
        outputs: Lists,
        inputs: Tensors,
        *given: Any,
        **named: Any,
    ) -> Any:
        opts = options_in(AllgatherOptions, given, named)
        return self._run(
            moves.all_gather, outputs, inputs, opts=opts, result=[*tensors_in(outputs)]
        )

    @_ranged("all_gather")
    def allgather_coalesced(
        self,
        outputs: Lists,
        inputs: Tensors,
        *given: Any,
        **named: Any,
    ) -> Any:
        """``outputs[rank][i]`` is for that rank's ``inputs[i]``."""
        opts = options_in(AllgatherOptions, given, named)
        call = "all_gather_coalesced"
        for of_rank in outputs:
            self._pairs(call, of_rank, inputs)
        return self._run_all(
            [
                functools.partial(moves.all_gather, [[out[i] for out in outputs]], [input])
                for i, input in enumerate(inputs)
            ],
            opts=opts,
            result=outputs,
        )

    @_ranged("all_gather")
    def all_gather_single(self, output: Tensor, input: Tensor, *given: Any, **named: Any) -> Any:
        opts = options_in(AllgatherOptions, given, named)
        return self._run(moves.all_gather_single, output, input, opts=opts, result=[output])

    @_ranged("all_gather")
    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, *given: Any, **named: Any
    ) -> Any:
        opts = options_in(AllgatherOptions, given, named)
        return self._run_all(
            [
                functools.partial(moves.all_gather_single, output, input)
                for output, input in self._pairs("all_gather_single_coalesced", outputs, inputs)
            ],
            opts=opts,
            result=outputs,
        )

    @_ranged("gather")
    def gather(
        self,
        outputs: Lists,
        inputs: Tensors,
        *given: Any,
        **named: Any,
    ) -> Any:
        opts = options_in(GatherOptions, given, named)
        return self._run(
            moves.gather, outputs, inputs, opts.rootRank, opts=opts, result=[*tensors_in(outputs)]
        )

    @_ranged("scatter")
    def scatter(
        self,
        outputs: Tensors,
        inputs: Lists,
        *given: Any,
        **named: Any,
    ) -> Any:
        opts = options_in(ScatterOptions, given, named)
        return self._run(moves.scatter, outputs, inputs, opts.rootRank, opts=opts, result=outputs)

    @_ranged("all_to_all")
    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        *given: Any,
        **named: Any,
    ) -> Any:
        opts = options_in(AllToAllOptions, given, named)
        return self._run(
            moves.all_to_all_single,
            output,
            input,
            output_splits,
            input_splits,
            opts=opts,
            result=[output],
        )

    @_ranged("all_to_all")
    def alltoall(self, outputs: Tensors, inputs: Tensors, *given: Any, **named: Any) -> Any:
        opts = options_in(AllToAllOptions, given, named)
        return self._run(moves.all_to_all, outputs, inputs, opts=opts, result=outputs)

    # Names of the same in older versions of torch, whose C++ code still asks for some of them.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # --- barriers and messages -------------------------------------------------------------------

    @_ranged("barrier")
    def barrier(self, *given: Any, **named: Any) -> Any:
        opts = options_in(BarrierOptions, given, named)
        return self._run(moves.barrier, opts=opts, result=[])

    def monitored_barrier(
        self, timeout: timedelta | float | None = None, wait_all_ranks: bool = False
    ) -> None:
        """A barrier that tells which ranks did not come; the group stays usable.

        Args:
            timeout: the group's if None; a number is seconds.
            wait_all_ranks: rank 0 names all that are missing, not the first one alone.

        Raises:
            CommTimeoutError: on every rank that came. PeerLostError: a rank is gone.
        """
        timeout_s = self._timeout_s
        if isinstance(timeout, timedelta):
            timeout_s = timeout.total_seconds()
        elif isinstance(timeout, (int, float)):
            timeout_s = timeout
        elif timeout is not None:
            refuse(
                "monitored_barrier",
                self.mail,
                f"timeout is {timeout!r}. Pass a datetime.timedelta.",
            )
        number, self._barriers = self._barriers, self._barriers + 1
        barrier = MonitoredBarrier(
            self._store, self.rank(), self.size(), number, self._check_present
        )
        barrier.wait(timeout_s, wait_all_ranks)

    # --- several at once (torch.distributed._coalescing_manager) ---------------------------------

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> Works:
        """All that was started in between: it ran at once, each in its turn."""
        works, self._coalesced = self._coalesced or [], None
        return Works(works)

    @_ranged("send")
    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> Work:
        return self._started(
            messages.send(tensors, dst, tag, self.mail, self._timeout_s), list(tensors)
        )

    @_ranged("recv")
    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> Work:
        return self._started(
            messages.recv(tensors, src, tag, self.mail, self._timeout_s), list(tensors)
        )

    @_ranged("recvAnySource")
    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Work:
        return self._started(
            messages.recv(tensors, None, tag, self.mail, self._timeout_s), list(tensors)
        )

    # --- the end ---------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Leave, together with the other members. ``destroy_process_group`` calls it."""
        if self._group is not None:
            self._end_backward()
            self._group = None
            self._leave()

    def abort(self) -> None:
        """End the group: every rank's pending and later calls raise ``PeerLostError``."""
        if self._group is not None:
            self._group.abort(
                f"rank {self.rank()} aborted the process group (torch.distributed's abort)."
            )
        self.shutdown()

    # --- how operations are run ------------------------------------------------------------------

    def _run(self, operation: Callable[..., Any], *args: Any, opts: Any, result: Any) -> Any:
        asynchronous = is_asynchronous(opts)
        self._deliver_to(args)
        work = operation(*args, self.core, self._timeout_of(opts), asynchronous)
        return _over(result) if work is None else self._started(work, list(result))

    def _run_all(self, starts: Sequence[functools.partial[Any]], *, opts: Any, result: Any) -> Any:
        asynchronous, timeout_s = is_asynchronous(opts), self._timeout_of(opts)
        if not starts:  # ranks whose lists are not empty learn that this one's is
            return self._run(moves.barrier, opts=opts, result=result)
        self._deliver_to([start.args for start in starts])
        works = [start(self.core, timeout_s, asynchronous) for start in starts]
        work = together(works, asynchronous)
        return _over(result) if work is None else self._started(work, list(result))

    def _deliver_to(self, arguments: Any) -> None:
        """What an operation reads or writes, earlier ones must have written."""
        if self._undelivered:
            memories = _memories(arguments)
            for work, written in self._undelivered.copy().items():
                if written & memories and not work.is_completed():
                    work.wait()

    def _started(self, work: pycomm_work.Work[Any], result: list[Any]) -> Work:
        started = Work(work, result)
        if isinstance(work, Delivery):
            future = started.future()  # settled, and the results delivered, if nobody waits, too
            undelivered = self._undelivered
            undelivered[started] = _memories(result)

            def forget(_: object) -> None:
                undelivered.pop(started, None)

            future.add_done_callback(forget)
        if self._coalesced is not None:
            self._coalesced.append(started)
        return started

    def _pairs(self, call: str, outputs: Tensors, inputs: Tensors) -> list[tuple[Tensor, Tensor]]:
        if len(outputs) != len(inputs):
            refuse(
                call,
                self.core,
                f"there are {len(outputs)} outputs for {len(inputs)} inputs. Pass one for each.",
            )
        return list(zip(outputs, inputs, strict=True))

    def _set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()
        self._has_own_timeout = True

    def _timeout_of(self, opts: Any) -> float:
        """Torch's options without a timeout have a negative one."""
        seconds: float = opts.timeout.total_seconds()
        return seconds if seconds > 0 else self._timeout_s


def _let_torch_shut_down() -> None:
    """PyTorch 2.6 shuts down groups of NCCL only, when they are destroyed; later ones all."""
    of_nccl = distributed_c10d._shutdown_backend

    def shut_down(group: Any) -> None:
        if isinstance(group, ProcessGroup):
            group.shutdown()
        else:
            of_nccl(group)

    distributed_c10d._shutdown_backend = shut_down


if not hasattr(dist.ProcessGroup, "shutdown"):
    _let_torch_shut_down()


def create_process_group(options: Any, backend_options: object) -> ProcessGroup:
    """What ``torch.distributed`` calls for the backend "pycomm".

    Args:
        options: ``_DistributedBackendOptions``: store, rank, size and timeout of the group.
        backend_options: there are none; None, or torch's class that all backends have in common.

    Raises:
        TypeError: ``pg_options`` of another backend. Otherwise as ``pycomm.init``.
    """
    kind = type(backend_options)
    if backend_options is not None and kind is not _OPTIONS_OF_ANY_BACKEND:
        raise TypeError(
            f"pg_options is a {kind.__qualname__}, and pycomm has no such options. Leave it out."
        )
    return ProcessGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        options.global_ranks_in_group,
    )


def _memories(values: Any) -> set[int]:
    """The pieces of memory in which tensors lie, however deep in lists."""
    return {t.untyped_storage().data_ptr() for t in tensors_in(values) if t.layout is torch.strided}


def _fits_backward(tensors: Tensors) -> bool:
    """Whether a turn takes them: another operation would wait until the turn is over."""
    return all(t.layout is torch.strided and t.is_cpu for t in tensors)


def _over(result: Any) -> DoneWork | None:
    return None if SAYS_ASYNC else DoneWork(list(result))
