"""ShardedOptimizer: the optimizer's state divided among the ranks that share a model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pycomm import _core
from pycomm._core import Extent, Group, ReduceOp
from pycomm.clipping import Spread, SpreadModel, scale_to_norm, spreads_of, total_norm
from pycomm.collectives import all_gather_into, all_reduce_, reduce_scatter_into
from pycomm.errors import InvalidArgumentError, NonFiniteGradient
from pycomm.finite_check import find_nonfinite, nonfinite_error
from pycomm.gradient_layout import GRADIENT_DTYPES
from pycomm.gradient_sync import SyncOptions
from pycomm.memory import dense_strides, lies_like
from pycomm.objects import all_gather_object
from pycomm.optimizer_state import install_state, options_of
from pycomm.owned_parameters import OwnedParameters
from pycomm.runtime import group_of

# Elements. Torch computes the end of a tensor, what does not fill two vector registers, with other
# instructions, which round 16-bit floats otherwise: cut here, a piece ends as the whole tensor.
_ALIGNMENT = 128

# What these compute of an element depends on others of its tensor, or on the loss.
_NOT_ELEMENT_WISE = ("LBFGS", "Adafactor", "Muon", "SparseAdam")


class ShardedOptimizer(Optimizer):
    """An optimizer of which each rank keeps and updates one share (ZeRO stage 1).

    ::

        optimizer = pycomm.ShardedOptimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
        pycomm.broadcast_parameters(model)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()

    ``backward()`` leaves each rank its own gradients in ``.grad``. ``step()`` reduces them, a share
    to each rank (reduce-scatter), updates the rank's share of the parameters, and gives every rank
    all of them (all-gather): the bits that ``DistributedOptimizer`` and the whole optimizer would
    give. A parameter that no rank has used keeps its value; one used on some ranks counts as zero
    on the others.

    Parameters become views of one piece of memory for each param group and dtype.

    Args:
        optimizer_class: computes each element of a parameter from that element's gradient and state
            alone, as SGD, Adam and their kin do.
        params: parameters, named or not, or param groups, as for ``optimizer_class``.
        group: the ranks that share the model, the world if None; every one of them makes this call.
        op: ``AVG``, or ``SUM``.
        check_finite: "error" or "skip", as in ``DistributedOptimizer``, where gradients are
            reduced: in ``step()``, or ``clip_grad_norm_()`` before it.
        options: for ``optimizer_class``, such as ``lr``.

    Raises:
        InvalidArgumentError: an optimizer that looks at whole tensors; a parameter that cannot be
            reduced, or that another wrapped optimizer has; on every rank.
        MismatchError: ranks have different parameters or arguments; on every rank.
        NonFiniteError: raised by ``step()`` and what else reduces, see ``check_finite``.

    Memory for n parameter bytes, p ranks and k state values an element (Adam: 2): k n/p of state,
    and n for the reduction beside ``.grad``. Cost of a step: the bytes of one all-reduce.

    Source: Rajbhandari et al., ZeRO, SC 2020.
    """

    def __init__(
        self,
        optimizer_class: type[Optimizer],
        params: Iterable[Any] = (),
        *,
        group: Group | None = None,
        op: ReduceOp = ReduceOp.AVG,
        check_finite: Literal["error", "skip"] | None = None,
        **options: Any,
    ) -> None:
        _check_class(optimizer_class)
        self._group = group_of(group, "ShardedOptimizer")
        # It never steps, and so has no state: it reads the arguments as the class does.
        make: Any = optimizer_class
        model: Optimizer = make(params, **options)
        super().__init__(model.param_groups, model.defaults)
        self._op = op
        self._owned = OwnedParameters()
        self._check_finite = check_finite
        sync_options = SyncOptions(op=op, check_finite=check_finite)
        self._owned.take_new("ShardedOptimizer", self.param_groups, None, sync_options, self._group)
        self._flats: list[_Flat] = []
        for number, param_group in enumerate(self.param_groups):
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for param in param_group["params"]:
                by_dtype.setdefault(param.dtype, []).append(param)
            self._flats += [_Flat(number, of, self._group) for of in by_dtype.values()]
        self._pieces = [piece for flat in self._flats for piece in flat.pieces]
        self._inner: Optimizer = make(
            [
                {
                    **options_of(own),
                    "params": [p.shard for p in self._pieces if p.param_group == number]
                    or [torch.nn.Parameter(torch.empty(0))],
                }
                for number, own in enumerate(self.param_groups)
            ]
        )
        self._is_reduced = False
        self._steps = 0
        self._skipped_steps = 0
        self._nonfinite: tuple[NonFiniteGradient, ...] = ()
        self._wait_seconds = 0.0

    @property
    def group(self) -> Group:
        """The ranks that have the other shares."""
        return self._group

    @property
    def wait_seconds(self) -> float:
        """Seconds spent reducing gradients and gathering parameters, since it was made."""
        return self._wait_seconds

    # --- the training loop ------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, the same on every rank. All ranks call it.

        Args:
            closure: computes the loss and its gradients, once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.synchronize()
        self._steps += 1
        self._is_reduced = False
        if self._nonfinite:
            self._skipped_steps += 1
            return loss
        for own, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update(options_of(own))
        self._inner.step()
        started = time.perf_counter()
        for flat in self._flats:
            flat.share_parameters(self._group)
        self._wait_seconds += time.perf_counter() - started
        return loss

    def synchronize(self) -> None:
        """Reduce what is in ``.grad``, unless that was done since the last step. All ranks call it.

        ``step()`` and ``clip_grad_norm_()`` do; no backward pass may come between.
        """
        if not self._is_reduced:
            started = time.perf_counter()
            self._reduce()
            self._wait_seconds += time.perf_counter() - started
            self._is_reduced = True
        if self._nonfinite and self._check_finite == "error":
            raise nonfinite_error(self._nonfinite, self._steps + 1, self._group)

    def _reduce(self) -> None:
        measures = self._check_finite is not None
        params = [param for flat in self._flats for param in flat.params]
        brought = [e for flat in self._flats for e in flat.take_gradients(self._group, measures)]
        flags = [int(param.grad is not None) for param in params]
        # Of each parameter whether a rank has used it, and the largest extent of all.
        told = torch.tensor([*flags, max(brought)], dtype=torch.uint8)
        all_reduce_(told, ReduceOp.MAX, group=self._group)
        *used, worst = told.tolist()
        by_param = {id(p): bool(u) for p, u in zip(params, used, strict=True)}
        for flat in self._flats:
            flat.reduce_gradients(self._op, self._group)
        for piece in self._pieces:
            piece.shard.grad = piece.gradient if by_param[id(piece.param)] else None
        self._nonfinite = ()
        if worst != Extent.SUMMABLE:
            self._nonfinite = self._find_nonfinite(params, brought)

    def _find_nonfinite(
        self, params: Sequence[Tensor], brought: Sequence[Extent]
    ) -> tuple[NonFiniteGradient, ...]:
        names = {id(param): name for name, param in self._owned.named}
        pieces = {id(piece.param): piece for piece in self._pieces}

        def is_nonfinite_here(index: int) -> bool:
            piece = pieces.get(id(params[index]))
            if piece is None or piece.shard.grad is None:
                return False
            return _extent(piece.shard.grad, self._group) == Extent.NON_FINITE

        named: list[tuple[str, int | None]] = [(names[id(param)], None) for param in params]
        return find_nonfinite(named, brought, is_nonfinite_here, self._group)

    @property
    def skipped_steps(self) -> int:
        """How many steps ``check_finite="skip"`` has skipped so far, on every rank."""
        return self._skipped_steps

    @property
    def nonfinite_gradients(self) -> tuple[NonFiniteGradient, ...]:
        """What ``check_finite`` has found when gradients were last reduced; the same everywhere."""
        return self._nonfinite

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, reduced ones too."""
        super().zero_grad(set_to_none)
        self._is_reduced = False

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        model: nn.Module | SpreadModel | None = None,
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of the reduced gradients; returns their norm.

        Collective; between the last ``backward()`` and ``step()``. ``.grad`` stays as it is: what
        is multiplied is what ``step()`` will use.

        Args:
            model: where the parameters are part of a larger model: the ``Pipeline`` that has them,
                or a module with layers of ``tensor_parallel``. The norm is that of all of it then.
        """
        spreads = [Spread(self._group), *([] if model is None else spreads_of(model))]
        self.synchronize()
        gradients = [
            (piece.param, piece.shard.grad)
            for piece in self._pieces
            if piece.shard.grad is not None
        ]
        total = total_norm(gradients, norm_type, spreads)
        shards = [piece.shard for piece in self._pieces]
        return scale_to_norm(shards, total, max_norm, error_if_nonfinite, self._group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the shares are dealt out."""
        if hasattr(self, "_inner"):
            raise InvalidArgumentError(
                f"add_param_group on rank {self._group.rank}: the parameters of a ShardedOptimizer "
                "are dealt out when it is made.\n  Make a new one over all parameters; "
                "full_state_dict() and load_full_state_dict() carry the state over."
            )
        super().add_param_group(param_group)

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's share, for the same number of ranks. No communication."""
        place = {"rank": self._group.rank, "ranks": self._group.size}
        return {"place": place, "inner": self._inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what ``state_dict()`` of the same rank of as many ranks returned.

        Raises:
            InvalidArgumentError: it is of another rank, or of something else.
        """
        place = {"rank": self._group.rank, "ranks": self._group.size}
        if state_dict.get("place") != place:
            raise InvalidArgumentError(
                f"load_state_dict on rank {self._group.rank} of {self._group.size}: the state is "
                f"that of {state_dict.get('place', 'another optimizer')}.\n"
                "  Save full_state_dict() and load it with load_full_state_dict(), on any number "
                "of ranks."
            )
        self._inner.load_state_dict(state_dict["inner"])
        self._take_options(self._inner.param_groups)

    def full_state_dict(self) -> dict[str, Any]:
        """What the whole optimizer's ``state_dict()`` would be, on the host; on every rank.

        Collective. A bare ``optimizer_class`` over the same parameters loads it, and so does
        ``load_full_state_dict()`` on any number of ranks.
        """
        mine: dict[int, dict[str, Any]] = {}
        numbers = self._numbers()
        for piece in self._pieces:
            state = self._inner.state.get(piece.shard)
            if state:
                mine[numbers[id(piece.param)]] = {
                    key: value.cpu() if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
        parts: dict[int, list[dict[str, Any]]] = {}
        for theirs in all_gather_object(mine, group=self._group):
            for number, state in theirs.items():
                parts.setdefault(number, []).append(state)
        params = {numbers[id(piece.param)]: piece for piece in self._all_pieces()}
        whole = {
            number: {key: params[number].joined([s[key] for s in states]) for key in states[0]}
            for number, states in sorted(parts.items())
        }
        packed = super().state_dict()
        return {"state": whole, "param_groups": packed["param_groups"]}

    def load_full_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's share out of a whole optimizer's state, the same on every rank.

        Raises:
            InvalidArgumentError: it is of other param groups.
        """
        groups = state_dict.get("param_groups", [])
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise InvalidArgumentError(
                f"load_full_state_dict on rank {self._group.rank}: the state has {sizes} "
                "parameters in its groups, and the optimizer "
                f"{[len(group['params']) for group in self.param_groups]}."
            )
        self._take_options(groups)
        numbers = self._numbers()
        for piece in self._pieces:
            state = state_dict["state"].get(numbers[id(piece.param)])
            if state is not None:
                options = self.param_groups[piece.param_group]
                counts_on_host = not (options.get("capturable") or options.get("fused"))
                self._inner.state[piece.shard] = {
                    key: piece.cut_out(value, on_host=key == "step" and counts_on_host)
                    for key, value in state.items()
                }

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """Of the optimizer that is divided."""
        return type(self._inner)

    def state_pieces(self) -> list[StatePiece]:
        """What this rank keeps of the state; together the ranks have each element once."""
        return [
            StatePiece(
                piece.param,
                piece.begin,
                piece.shard.numel(),
                dict(self._inner.state.get(piece.shard, {})),
            )
            for piece in self._pieces
        ]

    def load_state_pieces(
        self, states: Sequence[Mapping[str, Any]], options: Sequence[Mapping[str, Any]]
    ) -> None:
        """Replace this rank's state. No communication.

        Args:
            states: of each of ``state_pieces()``, in that order; empty for none.
            options: of each param group, such as ``lr``; what is not there stays as it is.
        """
        of_shards: dict[Tensor, Mapping[str, Any]] = {
            piece.shard: state for piece, state in zip(self._pieces, states, strict=True) if state
        }
        install_state(self._inner, of_shards, options)
        self._take_options(self._inner.param_groups)

    def _take_options(self, groups: Iterable[dict[str, Any]]) -> None:
        for own, theirs in zip(self.param_groups, groups, strict=True):
            own.update(options_of(theirs))

    def _numbers(self) -> dict[int, int]:
        """How a state_dict numbers parameters, by id."""
        params = [param for group in self.param_groups for param in group["params"]]
        return {id(param): number for number, param in enumerate(params)}

    def _all_pieces(self) -> list[_Piece]:
        """One for each parameter, here or not: they know its shape."""
        return [_Piece.of_whole(flat.param_group, p) for flat in self._flats for p in flat.params]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a ShardedOptimizer belongs to its process: it cannot be pickled or copied.\n"
            "  Save optimizer.full_state_dict(), which loads into the bare optimizer too."
        )


@dataclasses.dataclass(frozen=True)
class StatePiece:
    """One rank's share of the state of a parameter: that of a run of its elements.

    Args:
        param: the whole parameter.
        begin, count: of the run, in the order of the parameter's memory (``dense_strides``).
        state: 1-D tensors with a value for each element, and what holds for all elements.
    """

    param: Tensor
    begin: int
    count: int
    state: dict[str, Any]


@dataclasses.dataclass(eq=False)
class _Piece:
    """What one rank has of a parameter: elements in the order of the parameter's memory."""

    param_group: int
    param: Tensor
    begin: int  # in the parameter
    shard: torch.nn.Parameter
    gradient: Tensor

    @staticmethod
    def of_whole(param_group: int, param: Tensor) -> _Piece:
        return _Piece(param_group, param, 0, torch.nn.Parameter(param, False), param)

    def joined(self, values: list[Any]) -> Any:
        """A state value of the whole parameter, from all ranks' pieces in order."""
        if not isinstance(values[0], Tensor) or values[0].dim() == 0:
            return values[0]
        flat = torch.cat(values)
        return flat.as_strided(self.param.shape, dense_strides(self.param)).contiguous()

    def cut_out(self, value: Any, *, on_host: bool) -> Any:
        """This piece of a state value of the whole parameter, where the parameter is.

        Args:
            on_host: it stays there; so do the steps that torch's optimizers count, as a rule.
        """
        if not isinstance(value, Tensor):
            return value
        if value.shape != self.param.shape or value.dim() == 0:
            return value.clone() if on_host else value.to(self.param.device, copy=True)
        strides = dense_strides(self.param)
        dense = torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)
        flat = dense.as_strided((value.numel(),), (1,))
        return flat[self.begin : self.begin + self.shard.numel()].to(self.param.device).clone()


class _Flat:
    """The parameters of one param group and dtype end to end, and their gradients likewise.

    A share is a p-th. Parameters begin, and shares end, at multiples of ``_ALIGNMENT``.
    """

    def __init__(self, param_group: int, params: list[Tensor], group: Group) -> None:
        self.param_group = param_group
        self.params = params
        count = sum(_aligned(param.numel()) for param in params)
        self._share = _aligned(-(-count // group.size))
        self._values = _memory(params[0], self._share * group.size, group)
        self._gradients = _memory(params[0], self._share * group.size, group)
        first = self._share * group.rank
        self._my_values = self._values[first : first + self._share]
        self._my_gradients = self._gradients[first : first + self._share]
        self.pieces: list[_Piece] = []
        self._views: list[Tensor] = []  # of each parameter's gradient
        self._addresses: list[int] = []  # of each parameter
        offset = 0
        for param in params:
            strides, length = dense_strides(param), param.numel()
            view = self._values[offset : offset + length].as_strided(param.shape, strides)
            view.copy_(param.detach())
            param.data = view
            self._addresses.append(param.data_ptr())
            gradient = self._gradients[offset : offset + length]
            self._views.append(gradient.as_strided(param.shape, strides))
            begin, end = max(offset, first), min(offset + length, first + self._share)
            if begin < end:
                self.pieces.append(
                    _Piece(
                        param_group,
                        param,
                        begin - offset,
                        torch.nn.Parameter(self._values[begin:end]),
                        self._gradients[begin:end],
                    )
                )
            offset += _aligned(length)

    def take_gradients(self, group: Group, measures: bool) -> list[Extent]:
        """Copy this rank's gradients, and measure them meanwhile if asked to."""
        extents = []
        for param, view, address in zip(self.params, self._views, self._addresses, strict=True):
            if param.data_ptr() != address:
                raise InvalidArgumentError(
                    f"ShardedOptimizer on rank {group.rank}: a parameter of shape "
                    f"{tuple(param.shape)} has got other memory since the optimizer was made.\n"
                    "  Move or convert the model (model.to(), model.half()) before."
                )
            extent = Extent.SUMMABLE
            if param.grad is None:
                view.zero_()
            elif measures and param.grad.layout is torch.strided and lies_like(param.grad, view):
                dtype, nbytes = GRADIENT_DTYPES[param.dtype][0], param.numel() * param.itemsize
                addresses = view.data_ptr(), param.grad.data_ptr()
                extent = _core.copy_measured(dtype, *addresses, nbytes, group.size)
            else:
                view.copy_(param.grad)
                extent = _extent(view, group) if measures else extent
            extents.append(extent)
        return extents

    def reduce_gradients(self, op: ReduceOp, group: Group) -> None:
        """Leave this rank its share of all ranks' gradients."""
        reduce_scatter_into(self._my_gradients, self._gradients, op, group=group)

    def share_parameters(self, group: Group) -> None:
        """Give every rank all shares."""
        all_gather_into(self._values, self._my_values, group=group)


def _extent(dense: Tensor, group: Group) -> Extent:
    dtype, nbytes = GRADIENT_DTYPES[dense.dtype][0], dense.numel() * dense.itemsize
    return _core.extent(dtype, dense.data_ptr(), nbytes, group.size)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _memory(like: Tensor, count: int, group: Group) -> Tensor:
    """Zeroed; on the host, where the other ranks can read it."""
    if not like.is_cpu:
        return torch.zeros(count, dtype=like.dtype, device=like.device)
    buffer = group.allocate(count * like.element_size())
    return torch.frombuffer(buffer, dtype=like.dtype, count=count)


def _check_class(optimizer_class: Any) -> None:
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(
            "ShardedOptimizer takes the class of an optimizer, such as torch.optim.AdamW, and then "
            f"its parameters and options, not a {type(optimizer_class).__name__}"
        )
    names = {base.__name__ for base in optimizer_class.__mro__}
    refused = next((name for name in _NOT_ELEMENT_WISE if name in names), None)
    if refused is not None:
        raise InvalidArgumentError(
            f"ShardedOptimizer cannot divide {refused}, which computes with whole tensors: a rank "
            "has pieces of them.\n  Wrap it in DistributedOptimizer, or use an element-wise one."
        )
