"""Reduce gradients while autograd computes them. Knows parameters and groups, no optimizers."""

from __future__ import annotations

import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pycomm import _core, device
from pycomm.arguments import Precision, reduction_algorithm
from pycomm.compression.protocol import Compressor, described
from pycomm.end_of_backward import EndOfBackward, no_backward
from pycomm.errors import CommError, InvalidArgumentError, NonFiniteError, NonFiniteGradient
from pycomm.finite_check import find_nonfinite, nonfinite_error
from pycomm.gradient_layout import DEFAULT_BUCKET_CAP_BYTES, Slot, lay_out
from pycomm.memory import lies_like


@dataclasses.dataclass(frozen=True)
class SyncOptions:
    """How gradients are reduced, and what is checked; the same on all ranks.

    ``DistributedOptimizer`` documents them.
    """

    op: _core.ReduceOp = _core.ReduceOp.AVG
    bucket_cap_bytes: int = DEFAULT_BUCKET_CAP_BYTES
    backward_passes_per_step: int = 1
    average_accumulated: bool = False
    sparse_as_dense: bool = False
    overlap: bool = True
    precision: Precision | None = None
    check_finite: Literal["error", "skip"] | None = None
    verify: Literal["checksum"] | None = None
    verify_every: int = 100
    compressor: Compressor | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        """What all ranks must have in common."""
        return f"{self!r}, compressor={described(self.compressor)}"

    def check(self) -> None:
        if self.op not in (_core.ReduceOp.AVG, _core.ReduceOp.SUM):
            raise InvalidArgumentError(
                f"op is {self.op!r}. Gradients are averaged or summed: pass AVG or SUM."
            )
        for name in ("bucket_cap_bytes", "backward_passes_per_step", "verify_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(f"{name} is {value!r}. Pass a positive integer.")
        if self.precision not in (None, "exact_order"):
            raise InvalidArgumentError(
                f'precision is {self.precision!r}. Pass "exact_order", or None.'
            )
        if self.check_finite not in (None, "error", "skip"):
            raise InvalidArgumentError(
                f'check_finite is {self.check_finite!r}. Pass "error", "skip", or None.'
            )
        if self.verify not in (None, "checksum"):
            raise InvalidArgumentError(f'verify is {self.verify!r}. Pass "checksum", or None.')
        if self.compressor is None:
            return
        for method in ("compress", "decompress"):
            if not callable(getattr(self.compressor, method, None)):
                raise InvalidArgumentError(
                    f"compressor is {self.compressor!r}, which has no {method}().\n"
                    "  Pass one of pycomm.compression, such as pycomm.compression.Float16(), or an "
                    "object with the methods of pycomm.compression.Compressor."
                )
        if isinstance(self.compressor, type):
            raise InvalidArgumentError(
                f"compressor is the class {self.compressor.__name__}. Pass an object of it: "
                f"{self.compressor.__name__}()."
            )
        if self.precision is not None:
            raise InvalidArgumentError(
                f"precision is {self.precision!r} and there is a compressor, which replaces the "
                "sum that the precision is of.\n  Pass one of them."
            )


class Announce(Protocol):
    """Called by every rank that opens a synchronised pass, before it reduces anything."""

    def __call__(self, label: int) -> int:
        """Return the number of ranks an average is over."""


class GradientSync:
    """Makes the gradients of a list of parameters equal on all ranks of a group.

    A backward pass is *accumulating* (inside ``no_sync()``, or one of the first
    ``backward_passes_per_step - 1``): it leaves each rank its own sum in ``.grad``. Or it is
    *synchronised*: when ``backward()`` returns, every ``.grad`` is a view of a bucket and holds
    the reduced result. Synchronised passes are collective: all ranks make the same ones.

    The first synchronised pass only records how often and in which order gradients become final.
    At its end rank 0's order lays out the buckets of all ranks; later passes reduce each bucket as
    soon as it is full. Parameters added or unfrozen make the next pass record again.

    Which contribution a rank makes is its ``.grad`` at the end of the pass, zero if it is None,
    also where no hook has seen it come. A parameter for which no rank has a new gradient keeps
    the ``.grad`` it had.

    Dropping the object unhooks its parameters.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        group: _core.Group,
        options: SyncOptions,
        announce: Announce,
    ) -> None:
        self.group = group
        self.options = options
        # A rank that is alone has nobody to send to.
        self._compressor = options.compressor if group.size > 1 else None
        self.wait_seconds = 0.0
        """Time this rank's training thread has spent waiting for gradients."""
        self.passes = 0
        """Synchronised passes begun so far."""
        self.steps = 0
        """Steps made so far, or skipped."""
        self.nonfinite: tuple[NonFiniteGradient, ...] = ()
        """What ``check_finite`` has found in the last synchronised pass: the same on every rank."""
        self._announce = announce
        self._slots: list[Slot] = []
        self._planned: list[Slot] = []
        self._unplanned: list[Slot] = []  # frozen so far, or added
        self._reducer: _core.Reducer | None = None  # None: the next pass records
        self._store: _core.HostBuckets | _core.GpuBuckets | None = None  # the reducer's
        self._gpu: int | None = None  # that the buckets lie on
        self._by_bucket: list[list[Slot]] = []  # planned
        self._handed_over = 0  # buckets of the pass in progress
        self._order: list[Slot] = []  # recorded
        self._end_of_backward: Callable[[], EndOfBackward | None] = no_backward
        self._accumulating = False  # the backward in progress
        self._accumulated_passes = 0
        self._no_sync_depth = 0
        self._is_open = False  # one pass of several backwards, closed by leave_one_pass()
        self._is_begun = False  # by one of its backwards
        self._final = False  # no backward since the last synchronised pass
        self._released_pass = 0  # results up to this pass were consumed and may be overwritten
        self._passes_since_step = 0
        self._divisor = 1
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove_hooks, self._handles)
        self.extend(parameters)

    def extend(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Synchronise more parameters; the next synchronised pass lays out all buckets anew."""
        self._forget_abandoned_backward()
        for name, param in parameters:
            slot = Slot(name, param)
            self._slots.append(slot)
            self._unplanned.append(slot)
            self._hook(slot)
        self._reducer = None

    # --- what the training loop tells -------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return [slot.name for slot in self._slots]

    def enter_no_sync(self) -> None:
        self._no_sync_depth += 1

    def leave_no_sync(self) -> None:
        self._no_sync_depth -= 1

    def enter_one_pass(self) -> None:
        """Backwards begun from here on are one pass; those in ``no_sync()`` accumulate before."""
        self._is_open, self._is_begun = True, False

    def leave_one_pass(self, *, complete: bool) -> None:
        """The pass is over, or an exception has ended it."""
        self._is_open = False
        if not complete:
            return
        if self._accumulates():
            self._accumulated_passes += self._no_sync_depth == 0
        elif self._is_begun:
            self._finish_pass()
        else:
            self.synchronize()

    def synchronize(self) -> None:
        """Make a synchronised pass of what is in ``.grad``, unless gradients are final already."""
        self._forget_abandoned_backward()
        if not self._final:
            self._begin_pass()
            self._finish_pass()

    def release(self) -> None:
        """The final gradients were consumed: a later backward may overwrite them."""
        self._released_pass = self.passes

    def expect_backward(self) -> None:
        """A closure is about to compute new gradients; the old ones were consumed."""
        self.release()
        self._final = False

    def step_done(self) -> None:
        self.steps += 1
        self.release()
        self._final = False
        self._accumulated_passes = 0
        self._passes_since_step = 0

    def gradients_zeroed(self) -> None:
        self.release()
        self._final = False
        self._accumulated_passes = 0
        for slot in self._slots:
            slot.pending = False
            slot.kept_grad = None

    def shadow_pass(self, label: int, ranks: int) -> None:
        """Take part in a synchronised pass of other ranks with zeros.

        Afterwards ``.grad`` holds what it holds there.
        """
        self._forget_abandoned_backward()
        for slot in self._slots:
            slot.param.grad = None
            slot.pending = False
        self._passes_since_step = label
        self._open_pass(ranks)
        self._finish_pass()
        self.release()

    # --- hooks ------------------------------------------------------------------------------------

    def _hook(self, slot: Slot) -> None:
        sync_reference = weakref.ref(self)  # parameters do not keep the optimizer alive

        def on_gradient(_: Tensor) -> None:
            sync = sync_reference()
            if sync is not None:
                sync._on_gradient(slot)

        # Torch hooks only what requires a gradient. The hook outlives freezing, so a parameter
        # that is unfrozen later has it.
        param = slot.param
        frozen = not param.requires_grad
        if frozen and not (param.is_floating_point() or param.is_complex()):
            return
        if frozen:
            param.requires_grad_(True)
        handle = param.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]
        self._handles.append(handle)
        if frozen:
            param.requires_grad_(False)

    def _on_gradient(self, slot: Slot) -> None:
        if self._end_of_backward() is None:
            self._open_backward()
        grad = slot.param.grad
        assert grad is not None
        if grad.requires_grad:
            self._refuse(
                slot,
                "was computed by backward(create_graph=True), and the reduced gradient has no "
                "graph.\n  Take gradients of gradients from torch.autograd.grad(..., "
                "create_graph=True) and call backward() without it on the final loss.",
            )
        in_place = grad is slot.view  # autograd added to what was there
        if in_place and (self._accumulating or slot.last_pass != self.passes):
            self._refuse_final(slot, grad)
        reducer = self._reducer
        if self._accumulating:
            slot.pending = True
        elif reducer is None:
            if slot.firings == 0:
                self._order.append(slot)
            slot.firings += 1
            slot.pending = True
        else:
            stream = self._stream()
            if not in_place:
                self._stage(slot, grad, stream)
            elif self._gpu is not None or self.options.check_finite is not None:
                reducer.fill(slot.index, 0, stream)
            slot.pending = False
            slot.last_pass = self.passes
            reducer.ready(slot.index, stream)
            self._hand_over(reducer)

    def _open_backward(self) -> None:
        """The first hook of a backward decides what becomes of it."""
        accumulating = self._accumulates()
        if not accumulating and not (self._is_open and self._is_begun):
            self._begin_pass()
            self._is_begun = True
        self._accumulating = accumulating
        self._final = False
        self._end_of_backward = weakref.ref(EndOfBackward(self._close_backward))

    def _accumulates(self) -> bool:
        return (
            self._no_sync_depth > 0
            or self._accumulated_passes + 1 < self.options.backward_passes_per_step
        )

    def _close_backward(self) -> None:
        self._end_of_backward = no_backward
        accumulating, self._accumulating = self._accumulating, False
        if self._is_open:
            return
        if not accumulating:
            self._finish_pass()
        elif self._no_sync_depth == 0:
            self._accumulated_passes += 1

    def _forget_abandoned_backward(self) -> None:
        """Outside a backward: one that an exception ended may have left its end behind."""
        self._end_of_backward = no_backward
        self._accumulating = False

    # --- a synchronised pass ----------------------------------------------------------------------

    def _begin_pass(self) -> None:
        self._passes_since_step += 1
        self._open_pass(self._announce(self._passes_since_step))

    def _open_pass(self, ranks: int) -> None:
        if any(slot.param.requires_grad for slot in self._unplanned):
            self._reducer = None
        self.passes += 1
        self._divisor = ranks if self.options.op is _core.ReduceOp.AVG else 1
        if self.options.average_accumulated:
            self._divisor *= self.options.backward_passes_per_step
        if self._reducer is not None:
            self._begin_reduction(self._reducer)
        else:
            self._order.clear()
            for slot in self._slots:
                slot.firings = 0

    def _begin_reduction(self, reducer: _core.Reducer) -> None:
        # The core divides a SUM by nothing, and an AVG by what it is told.
        op = _core.ReduceOp.AVG if self._divisor > 1 else _core.ReduceOp.SUM
        reducer.begin(op, self._divisor, self._passes_since_step)
        self._handed_over = 0
        if self._gpu is not None:
            for slot in self._planned:  # what a pass before left so was ended by an exception
                slot.waiting = False

    def _finish_pass(self) -> None:
        """Launch what is left of the pass and wait for all of it."""
        started = time.perf_counter()
        reducer = self._reducer
        if reducer is None:
            reducer = self._reducer = self._plan()
            self._begin_reduction(reducer)
        stream = self._stream()
        unused_here = []
        for index in reducer.unfired():
            slot = self._planned[index]
            if self._brings_gradient(slot):
                self._stage_pending(slot, stream)
                reducer.ready(index, stream)
            else:
                self._set_aside(slot, reducer)
                unused_here.append(slot)
        try:
            reducer.finish(stream)
            self._hand_over(reducer)
            reducer.wait(stream)
        except CommError:
            self._evacuate()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - started
        for slot in unused_here:
            if reducer.used(slot.index):
                slot.param.grad = slot.view
                slot.last_pass = self.passes
            else:
                slot.param.grad = slot.kept_grad = slot.private_grad
            slot.private_grad = None
            slot.pending = False
        if self.options.op is _core.ReduceOp.SUM:
            for slot in self._planned:
                assert slot.view is not None
                slot.version = slot.view._version
        self._accumulated_passes = 0
        self._final = True
        if self.options.check_finite is not None:
            self._check_finite(reducer)

    def _check_finite(self, reducer: _core.Reducer) -> None:
        """Learn what of the pass is not finite, and whose fault that is.

        Every pass looks at all there is: what a pass before has left in ``.grad`` of a parameter
        that this one has not used lies in the bucket too.
        """
        store = self._store
        assert isinstance(store, _core.HostBuckets)
        self.nonfinite = ()
        if store.worst() is _core.Extent.SUMMABLE:
            return
        bucket_of = {i: number for number, b in enumerate(reducer.buckets) for i in b.parameters}
        self.nonfinite = find_nonfinite(
            [(slot.name, bucket_of[slot.index]) for slot in self._planned],
            store.brought(),
            lambda index: reducer.used(index) and store.extent(index) is _core.Extent.NON_FINITE,
            self.group,
            summed=self._compressor is None,
        )
        if self.nonfinite and self.options.check_finite == "error":
            raise self.nonfinite_error()

    def nonfinite_error(self) -> NonFiniteError:
        return nonfinite_error(self.nonfinite, self.steps + 1, self.group)

    def _brings_gradient(self, slot: Slot) -> bool:
        """Whether .grad of a parameter that has not fired holds what was never reduced.

        That is what an accumulating pass has left, or what came without a hook: set by hand (from
        ``torch.autograd.grad``), or computed before the parameter was wrapped.
        """
        grad = slot.param.grad
        if grad is None:
            return False
        return slot.pending or (grad is not slot.view and grad is not slot.kept_grad)

    def _stage_pending(self, slot: Slot, stream: int) -> None:
        """What accumulating passes, the recording one, or no hook left in .grad is reduced now."""
        grad = slot.param.grad
        assert grad is not None
        if grad is not slot.view:
            self._stage(slot, grad, stream)
        slot.pending = False
        slot.last_pass = self.passes

    def _stage(self, slot: Slot, grad: Tensor, stream: int) -> None:
        """Copy a gradient into its bucket and let ``.grad`` be the view of it.

        On a GPU a bucket's gradients are copied by one kernel when it is launched: see _hand_over.
        """
        view = slot.view
        assert view is not None
        if grad.layout is not torch.strided:
            if not self.options.sparse_as_dense:
                self._refuse(
                    slot,
                    f"is sparse ({grad.layout}), and buckets are dense.\n  Pass "
                    "sparse_as_dense=True to DistributedOptimizer, or build the module with "
                    "sparse=False.",
                )
            grad = grad.to_dense()
        if grad.dtype is not view.dtype or grad.shape != view.shape:
            self._refuse(
                slot,
                f"is {grad.dtype} of shape {tuple(grad.shape)}, and its bucket was laid out for "
                f"{view.dtype} of shape {tuple(view.shape)}.\n  Convert the model before "
                "DistributedOptimizer wraps its optimizer.",
            )
        reducer = self._reducer
        assert reducer is not None
        if self._gpu is not None:
            source = grad if lies_like(grad, view) else torch.empty_like(view).copy_(grad)
            reducer.fill(slot.index, source.data_ptr(), stream)
            slot.param.grad = source  # a parameter used twice adds to it
            slot.waiting, slot.stream = True, stream
            return
        if lies_like(grad, view):
            reducer.fill(slot.index, grad.data_ptr())
            torch.autograd.graph.increment_version(view)
        else:
            view.copy_(grad)
            if self.options.check_finite is not None:
                reducer.fill(slot.index, 0)
        slot.param.grad = view

    def _hand_over(self, reducer: _core.Reducer) -> None:
        """On a GPU: what the buckets just launched took in is theirs, and ``.grad`` the view."""
        if self._gpu is None:
            return
        stream = self._stream()
        launched = self._by_bucket[self._handed_over : reducer.launched]
        for slot in itertools.chain.from_iterable(launched):
            if not slot.waiting:
                continue
            slot.waiting = False
            grad, view = slot.param.grad, slot.view
            assert grad is not None and view is not None
            if slot.stream != stream:
                device.used_on_current_stream(grad)
            torch.autograd.graph.increment_version(view)
            slot.param.grad = view
        self._handed_over += len(launched)

    def _stream(self) -> int:
        """Where this thread's work for the GPU of the buckets goes; 0 if they are the host's."""
        return 0 if self._gpu is None else device.current_stream(self._gpu)

    def _set_aside(self, slot: Slot, reducer: _core.Reducer) -> None:
        """Keep ``.grad`` of a parameter this pass has not used; the bucket will be overwritten.

        It may be a final gradient of another loss, or an accumulated one the user keeps. If others
        use the parameter it counts as this rank's contribution, as if zero had been added to it.
        """
        grad = slot.param.grad
        slot.private_grad = grad
        if grad is None or grad.layout is not torch.strided:
            return
        assert slot.view is not None
        if grad is slot.view:
            slot.private_grad = grad.clone()
        else:
            slot.view.copy_(grad)
        reducer.hold(slot.index)

    def _evacuate(self) -> None:
        """After a failure a peer may still write to the buckets: move gradients out of them."""
        for slot in self._planned:
            if slot.param.grad is slot.view and slot.view is not None:
                slot.param.grad = slot.view.clone()

    def _plan(self) -> _core.Reducer:
        # A parameter once planned stays so: freezing it costs overlap, not a new plan.
        planned = [
            slot for slot in self._slots if slot.view is not None or slot.param.requires_grad
        ]
        reducer, self._store = lay_out(
            planned,
            self._order,
            self.group,
            bucket_cap_bytes=self.options.bucket_cap_bytes,
            overlap=self.options.overlap,
            algorithm=reduction_algorithm(
                "DistributedOptimizer", self.options.precision, self.group
            ),
            compressor=self._compressor,
            measures=self.options.check_finite is not None,
        )
        place = device.place_of(planned[0].param) if planned else None
        self._gpu = None if place is None else place[0]
        self._by_bucket = [[planned[i] for i in bucket.parameters] for bucket in reducer.buckets]
        self._planned = planned
        self._unplanned = [slot for slot in self._slots if slot.view is None]
        return reducer

    # --- refusals ---------------------------------------------------------------------------------

    def _refuse_final(self, slot: Slot, grad: Tensor) -> None:
        """Raise if autograd has just added to a result that nobody has consumed."""
        if slot.last_pass > self._released_pass:
            self._refuse(
                slot,
                "is final, reduced over all ranks, and a second backward pass has added to it.\n"
                "  Call optimizer.step() or optimizer.zero_grad() before it; or, to accumulate, "
                "run all backward passes but the last in `with optimizer.no_sync():` or pass "
                "backward_passes_per_step to DistributedOptimizer.",
            )
        if self.options.op is _core.ReduceOp.SUM and grad._version == slot.version + 1:
            self._refuse(
                slot,
                "is a sum over all ranks from an earlier step, and a backward pass has added to "
                "it; summed again, it would count once for each rank.\n"
                "  Call optimizer.zero_grad() in every step, or use op=AVG.",
            )

    def _refuse(self, slot: Slot, problem: str) -> NoReturn:
        raise InvalidArgumentError(
            f"the gradient of '{slot.name}' on rank {self.group.rank} {problem}"
        )


def _remove_hooks(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
