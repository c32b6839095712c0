"""DistributedOptimizer: any PyTorch optimizer, fed with gradients reduced over the ranks."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from pycomm import _core
from pycomm.arguments import Precision, reducible
from pycomm.compression.protocol import Compressor
from pycomm.errors import CommError, InvalidArgumentError, NonFiniteGradient
from pycomm.gradient_layout import DEFAULT_BUCKET_CAP_BYTES
from pycomm.gradient_sync import GradientSync, SyncOptions
from pycomm.join import Announcement, Event, roster_of
from pycomm.owned_parameters import OwnedParameters
from pycomm.replicas import compare_replicas
from pycomm.runtime import group_of
from pycomm.state import broadcast_optimizer_state, broadcast_parameters

# Who reduces a parameter's gradient, by id(param): an optimizer keeps its parameters alive.
_by_parameter: weakref.WeakValueDictionary[int, DistributedOptimizer] = (
    weakref.WeakValueDictionary()
)


def optimizers_of(parameters: Iterable[Tensor]) -> list[DistributedOptimizer]:
    """The optimizers that reduce the gradients of these, each once, in their order."""
    found = (_by_parameter.get(id(param)) for param in parameters)
    return list(dict.fromkeys(optimizer for optimizer in found if optimizer is not None))


class _SkippedStepError(Exception):
    """Leads out of the wrapped optimizer's step, before it has changed anything."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss


def _of_wrapped(name: str) -> property:
    """An attribute that the wrapped optimizer has, or will have."""

    def get(self: DistributedOptimizer) -> Any:
        return getattr(self._inner, name)

    def set_(self: DistributedOptimizer, value: Any) -> None:
        setattr(self._inner, name, value)

    def delete(self: DistributedOptimizer) -> None:
        delattr(self._inner, name)

    return property(get, set_, delete)


class DistributedOptimizer(Optimizer):
    """An optimizer whose gradients are reduced over all ranks while ``backward()`` computes them.

    ::

        optimizer = pycomm.DistributedOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-3), model.named_parameters()
        )
        pycomm.broadcast_parameters(model)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    When ``backward()`` returns, every ``.grad`` holds the reduced gradient, the same bits on every
    rank: clip it, read it, or hand the optimizer to ``GradScaler`` or a scheduler as it is. All
    else is the wrapped optimizer's: ``param_groups``, ``state``, ``state_dict()`` (which loads
    into the bare optimizer) and hooks, which receive the wrapped optimizer.

    Where a rank may skip ``backward()`` (a batch it refuses), call ``synchronize()`` before reading
    or clipping gradients: what the other ranks' backward reduces reaches that rank there, or else
    in ``step()``.

    A parameter that a backward pass used on some ranks counts as zero on the others; one used on
    none keeps its ``.grad``, None for instance. Parameters may be frozen and unfrozen, on all ranks
    alike.

    The first synchronised backward records the order in which gradients arrive and reduces them
    at its end; later ones overlap. What a backward pass may do, and what is refused by name:
    a second pass that would add to a reduced gradient (``step()``, ``zero_grad()`` or ``no_sync()``
    must come between); ``create_graph=True``.

    Args:
        optimizer: to be wrapped. Its parameters are dense, all on the CPU or all on one GPU.
        named_parameters: names for errors and for the check that all ranks have the same model;
            may name more than the optimizer holds. The optimizer's own names, or numbers, if None.
        op: ``AVG``, or ``SUM``.
        group: the ranks taking part, the world if None; every one of them makes this call.
        bucket_cap_bytes: gradients are reduced in buckets of about this size.
        backward_passes_per_step: accumulate this many backward passes before reducing. They sum up,
            as in one process: divide the loss yourself, or pass ``average_accumulated``.
        average_accumulated: divide the reduced gradient by ``backward_passes_per_step`` as well.
        sparse_as_dense: reduce sparse gradients as dense ones; else they are refused.
        overlap: False reduces everything at the end of backward. For a graph in which a parameter's
            gradient arrives in a different number of pieces from pass to pass (a weight in a
            varying number of re-entrant checkpoints), which is refused otherwise.
        precision: "exact_order" gives gradients on GPUs the bits that they have on the host, as in
            ``all_reduce``.
        compressor: sends the gradients in fewer bytes, such as ``pycomm.compression.Float16()``,
            and changes them; docs/compression.md tells how.
        check_finite: look for NaN and infinity in the gradients of each synchronised pass, and find
            the parameters and the ranks that brought them. "error": ``backward()`` raises on every
            rank, and so does a ``step()`` with such gradients. "skip": ``step()`` does nothing, on
            any rank of the group, and counts (``skipped_steps``); ``nonfinite_gradients`` tells
            what it was. For parameters on the CPU. Where ``GradScaler`` skips steps it is the one
            that counts, and infinities are its business: pass "skip" or None then. With parts of a
            model on other ranks (pipelines, split layers) each group would skip for itself: pass
            "error", or scale with ``pycomm.GradScaler``.
        verify: "checksum" compares the parameters between the ranks, bit by bit, as
            ``verify_replicas`` does: after the first step, and after every ``verify_every``-th from
            there. Steps inside ``pycomm.join()`` do not count.

    Raises:
        InvalidArgumentError: a parameter without a name or two with the same, on an unsupported
            device or dtype, or in another DistributedOptimizer; none that requires a gradient.
        MismatchError: ranks have different parameters or arguments; on every rank.
        NonFiniteError: raised by ``backward()`` and ``step()``, see ``check_finite``; the group and
            the optimizer stay usable.
        DriftError: raised by ``step()``, see ``verify``; likewise.

    Cost: one copy of each gradient into its bucket; memory for one set of gradients; nothing in a
    group of one rank. ``check_finite`` looks while it copies, and sends one element more a bucket;
    a gradient that autograd has added to where it lies (``zero_grad(set_to_none=False)``) and what
    a compressor makes are read once for it, and so is a gradient whose sum might have overflowed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        op: _core.ReduceOp = _core.ReduceOp.AVG,
        group: _core.Group | None = None,
        bucket_cap_bytes: int = DEFAULT_BUCKET_CAP_BYTES,
        backward_passes_per_step: int = 1,
        average_accumulated: bool = False,
        sparse_as_dense: bool = False,
        overlap: bool = True,
        precision: Precision | None = None,
        compressor: Compressor | None = None,
        check_finite: Literal["error", "skip"] | None = None,
        verify: Literal["checksum"] | None = None,
        verify_every: int = 100,
    ) -> None:
        # Optimizer.__init__ is not called: it would make param_groups and state of its own.
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, DistributedOptimizer):
            raise TypeError(
                f"DistributedOptimizer wraps a torch.optim.Optimizer, not a "
                f"{type(optimizer).__name__}"
            )
        self._inner = optimizer
        self._group = group_of(group, "DistributedOptimizer")
        self._options = SyncOptions(
            op=op,
            bucket_cap_bytes=bucket_cap_bytes,
            backward_passes_per_step=backward_passes_per_step,
            average_accumulated=average_accumulated,
            sparse_as_dense=sparse_as_dense,
            overlap=overlap,
            precision=precision,
            compressor=compressor,
            check_finite=check_finite,
            verify=verify,
            verify_every=verify_every,
        )
        self._skipped_steps = 0
        self._steps_to_verify = 1
        self._parameters = OwnedParameters()
        self._sync: GradientSync | None = None

        parameters = self._take_new("DistributedOptimizer", named_parameters)
        # A group of one needs no hooks, except to count the passes it divides by, or to check.
        divides = average_accumulated and backward_passes_per_step > 1
        if self._group.size > 1 or divides or check_finite is not None:
            roster = roster_of(self._group)
            self._roster = roster
            self._number = roster.enrol(self)
            self_reference = weakref.ref(self)

            def announce(label: int) -> int:
                owner = self_reference()
                assert owner is not None
                return owner._announce(Event.BACKWARD, label)

            self._sync = GradientSync(parameters, self._group.duplicate(), self._options, announce)

    # --- the training loop ------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, the same on every rank.

        Reduces first if no backward pass has since the last step. All ranks call it.

        Args:
            closure: computes the loss and its gradients, as often as the wrapped optimizer asks.
                The loss is averaged over the ranks, so that all take the same decisions.

        Raises:
            NonFiniteError: the gradients are, and ``check_finite`` is "error"; or it is "skip", and
                the wrapped optimizer has asked the closure more than once (L-BFGS), so that the
                parameters are on their way already.
            DriftError: the ranks' parameters differ, see ``verify``; the step was made.
        """
        sync = self._sync
        if sync is None:
            return self._inner.step() if closure is None else self._inner.step(closure)
        result: Any = None
        if closure is not None:
            result = self._step_with(sync, closure)
        else:
            sync.synchronize()
            if not sync.nonfinite:
                result = self._inner.step()
            elif self._options.check_finite == "error":
                raise sync.nonfinite_error()
            else:
                self._skipped_steps += 1
        sync.step_done()
        if self._options.verify is not None:
            self._verify_now_and_then(sync)
        return result

    def _step_with(self, sync: GradientSync, closure: Callable[[], Any]) -> Any:
        evaluated = False

        def evaluate() -> Any:
            nonlocal evaluated
            loss = self._evaluate(sync, closure)
            if sync.nonfinite:
                if evaluated or self._options.check_finite == "error":
                    raise sync.nonfinite_error()
                raise _SkippedStepError(loss)
            evaluated = True
            return loss

        try:
            return self._inner.step(evaluate)
        except _SkippedStepError as skipped:
            self._skipped_steps += 1
            return skipped.loss

    def _verify_now_and_then(self, sync: GradientSync) -> None:
        if self._roster.session is not None:
            return  # ranks without batches do not step, and take the others' parameters at the end
        self._steps_to_verify -= 1
        if self._steps_to_verify == 0:
            self._steps_to_verify = self._options.verify_every
            compare_replicas(
                'verify="checksum"',
                self._parameters.named,
                False,
                sync.group,
                f", after its step {sync.steps}",
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, accumulated ones too."""
        self._inner.zero_grad(set_to_none)
        if self._sync is not None:
            self._sync.gradients_zeroed()

    def synchronize(self) -> None:
        """Reduce what is in ``.grad`` now; does nothing if gradients are final. All ranks call it.

        Needed before reading or clipping gradients that no synchronised ``backward()`` has made on
        this rank: after passes that were all made in ``no_sync()``, where a rank may have skipped
        ``backward()``, or for gradients set by hand (``torch.autograd.grad``). ``step()`` calls it.
        """
        if self._sync is not None:
            self._sync.synchronize()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes begun inside accumulate in ``.grad`` without communicating.

        They do not count among ``backward_passes_per_step``. The next pass outside, or ``step()``,
        reduces the sum.
        """
        if self._sync is None:
            yield
            return
        self._sync.enter_no_sync()
        try:
            yield
        finally:
            self._sync.leave_no_sync()

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """Backward passes begun inside count as one, whose gradients are final at the end of it.

        Each parameter's gradient is reduced as soon as a pass outside ``no_sync()`` has computed
        it, while others go on. For schedules that reach the end of the model's parts at different
        times; ``pycomm.pipeline`` uses it.
        """
        if self._sync is None:
            yield
            return
        self._sync.enter_one_pass()
        try:
            yield
        except BaseException:
            self._sync.leave_one_pass(complete=False)
            raise
        self._sync.leave_one_pass(complete=True)

    @property
    def wait_seconds(self) -> float:
        """Seconds this rank has spent waiting for gradients so far."""
        return 0.0 if self._sync is None else self._sync.wait_seconds

    @property
    def skipped_steps(self) -> int:
        """How many steps ``check_finite="skip"`` has skipped so far, on every rank."""
        return self._skipped_steps

    @property
    def nonfinite_gradients(self) -> tuple[NonFiniteGradient, ...]:
        """What ``check_finite`` has found in the last synchronised pass: the same on every rank."""
        return () if self._sync is None else self._sync.nonfinite

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the wrapped optimizer. All ranks call it, with the same parameters."""
        self._inner.add_param_group(param_group)
        try:
            added = self._take_new("add_param_group", None)
        except CommError:
            self._inner.param_groups.pop()  # it would be stepped, but never reduced
            raise
        if self._sync is not None:
            self._sync.extend(added)

    def _take_new(
        self, call: str, named_parameters: Iterable[tuple[str, Tensor]] | None
    ) -> list[tuple[str, Tensor]]:
        added = self._parameters.take_new(
            call, self._inner.param_groups, named_parameters, self._options, self._group
        )
        for _, param in added:
            _by_parameter[id(param)] = self
        return added

    def _evaluate(self, sync: GradientSync, closure: Callable[[], Any]) -> Any:
        sync.expect_backward()
        loss = closure()
        sync.synchronize()  # for a rank whose closure used no parameter
        if loss is None:
            return None
        mean = torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
        mean = mean.detach().clone()
        if mean.numel() != 1:
            raise InvalidArgumentError(
                f"step(closure) on rank {sync.group.rank}: the closure returned a loss of shape "
                f"{tuple(mean.shape)}.\n  Return one number."
            )
        dtype = reducible("step(closure)", "loss", mean, _core.ReduceOp.AVG, sync.group)
        ranks = self._announce(Event.LOSS, dtype.value)
        # On the host: a rank without batches, which takes part, does not know the loss's device.
        on_host = mean.cpu()
        self._reduce_loss(sync, on_host, dtype, ranks)
        if on_host is not mean:
            mean.copy_(on_host)
        return mean if isinstance(loss, Tensor) else mean.item()

    def _reduce_loss(
        self, sync: GradientSync, mean: Tensor, dtype: _core.DType, ranks: int
    ) -> None:
        address = mean.data_ptr()
        sync.group.all_reduce(
            address, address, 1, dtype, _core.ReduceOp.AVG, divisor=ranks, name="closure's loss"
        )

    # --- ranks that have run out of batches -------------------------------------------------------

    def _announce(self, event: Event, value: int) -> int:
        """Tell an open ``pycomm.join()`` what comes next; the number of ranks to average over."""
        session = self._roster.session
        if session is None:
            return self._group.size
        return session.announce(Announcement(event, self._number, value))

    def shadow(self, event: Event, value: int, ranks: int) -> None:
        """Take part in what other ranks announced, contributing zeros. For ``pycomm.join()``."""
        sync = self._sync
        assert sync is not None
        if event is Event.BACKWARD:
            sync.shadow_pass(value, ranks)
        else:
            zero = torch.zeros(8, dtype=torch.uint8)  # of any dtype
            self._reduce_loss(sync, zero, _core.DType(value), ranks)

    def adopt(self, root: int) -> None:
        """Take parameters and optimizer state of ``root``. For ``pycomm.join()``; collective."""
        broadcast_parameters(self._parameters.named, root=root, group=self._group)
        broadcast_optimizer_state(self._inner, root=root, group=self._group)
        if self._sync is not None:
            self._sync.gradients_zeroed()
            self._sync.step_done()

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """Of the wrapped optimizer."""
        return type(self._inner)

    def named_by_user(self) -> list[tuple[str, Tensor]]:
        """The parameters whose names were given in ``named_parameters``."""
        return self._parameters.named_by_user()

    # --- an Optimizer by delegation ---------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._inner.defaults

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, loadable into a bare one."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict)

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self._inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self._inner.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_load_state_dict_post_hook(hook, prepend)

    def __getattr__(self, name: str) -> Any:
        # What particular optimizers have besides, such as train() and eval() of schedule-free ones.
        if name == "_inner":  # not yet there, in __init__
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self._inner!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a DistributedOptimizer belongs to its process: it cannot be pickled or copied.\n"
            "  Save optimizer.state_dict(), which loads into the bare optimizer too."
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks this before it decides to skip step(). Either way it is done with
        # these gradients, and the next backward may overwrite them.
        if self._sync is not None:
            self._sync.release()
        return getattr(self._inner, "_step_supports_amp_scaling", False)

    # If so, it leaves these two for the fused step().
    grad_scale = _of_wrapped("grad_scale")
    found_inf = _of_wrapped("found_inf")
