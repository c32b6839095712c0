"""Many tensors as one operation for each of their dtypes.

The tensors of a dtype are laid end to end, moved together, and cut apart again. The operation's
name lists their shapes, so that its signature covers them all: ranks whose lists differ get a
``MismatchError``. Packing costs two passes over the tensors, a call with many small ones saves
their latencies.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from pycomm._core import DType, Group, ReduceOp
from pycomm.arguments import check_scales, divided, movable, reducible, refuse, root_rank, seconds
from pycomm.collectives.all_reduce import all_reduce
from pycomm.collectives.autograd import (
    blocking_only,
    followed,
    gradient_factor,
    linear,
    linear_only,
)
from pycomm.collectives.shards import all_gather, reduce_scatter
from pycomm.memory import writable
from pycomm.runtime import world_group
from pycomm.work import CoreWork, Together, Work, outcome


class _Pack(NamedTuple):
    """The tensors of one dtype."""

    dtype: DType
    places: list[int]  # in the caller's list
    tensors: list[Tensor]

    @property
    def name(self) -> str:
        return f"{len(self.tensors)} tensors: " + " ".join(
            str(tuple(t.shape)) for t in self.tensors
        )

    def flat(self) -> Tensor:
        """All elements, row-major, end to end."""
        return torch.cat([t.reshape(-1) for t in self.tensors])

    def lengths(self) -> list[int]:
        return [t.numel() for t in self.tensors]


# Starts one pack's operation on its packed input, into the packed output.
_Start = Callable[[_Pack, Tensor, Tensor], CoreWork | None]


@overload
def all_reduce_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> list[Tensor]: ...
@overload
def all_reduce_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[list[Tensor]]: ...
def all_reduce_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> list[Tensor] | Work[list[Tensor]]:
    """``[all_reduce(t, op) for t in tensors]`` as one operation for each dtype, with equal bits.

    Autograd follows it as it follows ``all_reduce``.

    Args:
        tensors: the same shapes and dtypes in the same order on every rank, any strides.
        op, prescale, postscale, group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor for each of ``tensors``, parts of one piece of memory for each dtype; or
        a ``Work`` whose ``wait()`` returns them.

    Raises:
        As ``all_reduce`` does. Nothing is sent unless all tensors are in order.
    """
    if group is None:
        group = world_group()
    call = "all_reduce_grouped"
    packs = _reducible_packs(call, tensors, op, prescale, postscale, group, async_op)
    limit_s = seconds(call, timeout_s, group)
    start = _all_reduction(op, prescale, postscale, group, limit_s, async_op)

    def transpose(gradient: Tensor) -> Tensor:
        return all_reduce(
            gradient,
            op,
            prescale=prescale,
            postscale=postscale,
            group=group,
            timeout_s=timeout_s,
        )

    return _new_tensors(packs, _Pack.flat, torch.empty_like, start, transpose, _cut, async_op)


@overload
def all_reduce_grouped_(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def all_reduce_grouped_(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
def all_reduce_grouped_(
    tensors: Sequence[Tensor],
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Replace each tensor by its reduction, as ``all_reduce_grouped`` does.

    Args:
        tensors: the same shapes and dtypes in the same order on every rank, any strides without
            overlap; overwritten.
        op, prescale, postscale, group, timeout_s: as for ``all_reduce``.
        async_op: return at once; ``Work.wait()`` writes the results into ``tensors``.

    Returns:
        None, or a ``Work``.

    Raises:
        As ``all_reduce_`` does. Nothing is sent unless all tensors are in order; they
        keep what they held if the operation fails.
    """
    if group is None:
        group = world_group()
    call = "all_reduce_grouped_"
    packs = _packs(
        call, tensors, group, lambda argument, t: reducible(call, argument, t, op, group)
    )
    _check_writable(call, tensors, group)
    _check_scales(call, tensors, prescale, postscale, group)
    limit_s = seconds(call, timeout_s, group)
    start = _all_reduction(op, prescale, postscale, group, limit_s, async_op)
    flats = [pack.flat().detach() for pack in packs]
    return _in_place(packs, flats, start, async_op)


@overload
def broadcast_grouped_(
    tensors: Sequence[Tensor],
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def broadcast_grouped_(
    tensors: Sequence[Tensor],
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
def broadcast_grouped_(
    tensors: Sequence[Tensor],
    root: int = 0,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Overwrite each of ``tensors`` with ``root``'s.

    Args:
        tensors: as for ``all_reduce_grouped_``.
        root: a rank of the group.
        group, timeout_s, async_op: as for ``all_reduce_grouped_``.

    Returns:
        None, or a ``Work``.

    Raises:
        As ``broadcast_`` does. Nothing is sent unless all tensors are in order; they
        keep what they held if the operation fails.
    """
    if group is None:
        group = world_group()
    call = "broadcast_grouped_"
    packs = _packs(call, tensors, group, lambda argument, t: movable(call, argument, t, group))
    _check_writable(call, tensors, group)
    root = root_rank(call, root, group)
    limit_s = seconds(call, timeout_s, group)

    def start(pack: _Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.broadcast(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            pack.dtype,
            root,
            name=pack.name,
            timeout_s=limit_s,
            async_op=async_op,
        )

    if group.rank == root:
        flats = [pack.flat().detach() for pack in packs]
    else:
        flats = [torch.empty(sum(pack.lengths()), dtype=pack.tensors[0].dtype) for pack in packs]
    return _in_place(packs, flats, start, async_op)


@overload
def all_gather_grouped(
    tensors: Sequence[Tensor],
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> list[Tensor]: ...
@overload
def all_gather_grouped(
    tensors: Sequence[Tensor],
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[list[Tensor]]: ...
def all_gather_grouped(
    tensors: Sequence[Tensor],
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> list[Tensor] | Work[list[Tensor]]:
    """``[all_gather(t) for t in tensors]`` as one operation for each dtype.

    Autograd follows it as it follows ``all_gather``.

    Args:
        tensors: the same shapes and dtypes in the same order on every rank, any strides.
        group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor of shape ``(p, *t.shape)`` for each of ``tensors``, or a ``Work`` whose
        ``wait()`` returns them.

    Raises:
        As ``all_gather`` does. Nothing is sent unless all tensors are in order.
    """
    if group is None:
        group = world_group()
    call = "all_gather_grouped"
    packs = _packs(call, tensors, group, lambda argument, t: movable(call, argument, t, group))
    _check_blocking(call, tensors, group, async_op)
    limit_s = seconds(call, timeout_s, group)
    p = group.size

    def start(pack: _Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.all_gather(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            pack.dtype,
            name=pack.name,
            timeout_s=limit_s,
            async_op=async_op,
        )

    def transpose(gradient: Tensor) -> Tensor:
        return reduce_scatter(gradient, group=group, timeout_s=timeout_s)[0]

    def cut(pack: _Pack, output: Tensor) -> list[Tensor]:
        # Each rank's elements of one tensor are a column: copied, so that results are contiguous.
        columns = torch.split(output, pack.lengths(), dim=1)
        return [
            column.contiguous().view(p, *t.shape)
            for column, t in zip(columns, pack.tensors, strict=True)
        ]

    def output_for(flat: Tensor) -> Tensor:
        return flat.new_empty((p, len(flat)))

    return _new_tensors(packs, _Pack.flat, output_for, start, transpose, cut, async_op)


@overload
def reduce_scatter_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> list[Tensor]: ...
@overload
def reduce_scatter_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[list[Tensor]]: ...
def reduce_scatter_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> list[Tensor] | Work[list[Tensor]]:
    """``[reduce_scatter(t, op) for t in tensors]`` as one operation for each dtype.

    Autograd follows it as it follows ``reduce_scatter``.

    Args:
        tensors: each of shape ``(p*k, *rest)`` with a ``k`` and ``rest`` of its own; the same
            shapes and dtypes in the same order on every rank, any strides.
        op, prescale, postscale, group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor of shape ``(k, *rest)`` for each of ``tensors``, parts of one piece of
        memory for each dtype; or a ``Work`` whose ``wait()`` returns them.

    Raises:
        As ``reduce_scatter`` does. Nothing is sent unless all tensors are in order.
    """
    if group is None:
        group = world_group()
    call = "reduce_scatter_grouped"
    packs = _reducible_packs(call, tensors, op, prescale, postscale, group, async_op)
    for index, t in enumerate(tensors):
        divided(call, f"tensors[{index}]", t, group)
    limit_s = seconds(call, timeout_s, group)
    p, factor = group.size, gradient_factor(op, prescale, postscale, group)

    def packed(pack: _Pack) -> Tensor:
        """Row ``r``: rank ``r``'s shards, end to end."""
        return torch.cat([t.reshape(p, t.numel() // p) for t in pack.tensors], dim=1)

    def start(pack: _Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.reduce_scatter(
            source.data_ptr(),
            output.data_ptr(),
            output.numel(),
            pack.dtype,
            op,
            prescale=prescale,
            postscale=postscale,
            name=pack.name,
            timeout_s=limit_s,
            async_op=async_op,
        )

    def transpose(gradient: Tensor) -> Tensor:
        return all_gather(gradient, group=group, timeout_s=timeout_s) * factor

    def cut(pack: _Pack, output: Tensor) -> list[Tensor]:
        parts = torch.split(output, [length // p for length in pack.lengths()])
        return [
            part.view(t.shape[0] // p, *t.shape[1:])
            for part, t in zip(parts, pack.tensors, strict=True)
        ]

    def output_for(rows: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[1])

    return _new_tensors(packs, packed, output_for, start, transpose, cut, async_op)


def _all_reduction(
    op: ReduceOp,
    prescale: float,
    postscale: float,
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> _Start:
    def start(pack: _Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.all_reduce(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            pack.dtype,
            op,
            prescale=prescale,
            postscale=postscale,
            name=pack.name,
            timeout_s=timeout_s,
            async_op=async_op,
        )

    return start


def _packs(
    call: str,
    tensors: Sequence[Tensor],
    group: Group,
    dtype_of: Callable[[str, Tensor], DType],
) -> list[_Pack]:
    """One for each dtype, in the order of their first tensors."""
    if isinstance(tensors, Tensor):
        refuse(
            call, group, "tensors is a Tensor. Pass a list of tensors, or call the form for one."
        )
    packs: dict[DType, _Pack] = {}
    for index, t in enumerate(tensors):
        dtype = dtype_of(f"tensors[{index}]", t)
        pack = packs.setdefault(dtype, _Pack(dtype, [], []))
        pack.places.append(index)
        pack.tensors.append(t)
    return list(packs.values())


def _reducible_packs(
    call: str,
    tensors: Sequence[Tensor],
    op: ReduceOp,
    prescale: float,
    postscale: float,
    group: Group,
    async_op: bool,
) -> list[_Pack]:
    packs = _packs(
        call, tensors, group, lambda argument, t: reducible(call, argument, t, op, group)
    )
    _check_scales(call, tensors, prescale, postscale, group)
    _check_blocking(call, tensors, group, async_op)
    if any(map(followed, tensors)):
        linear_only(call, op, group)
    return packs


def _check_scales(
    call: str, tensors: Sequence[Tensor], prescale: float, postscale: float, group: Group
) -> None:
    if prescale != 1 or postscale != 1:
        for t in tensors:
            check_scales(call, t, prescale, postscale, group)


def _check_blocking(call: str, tensors: Sequence[Tensor], group: Group, async_op: bool) -> None:
    if any(map(followed, tensors)):
        blocking_only(call, group, async_op)


def _check_writable(call: str, tensors: Sequence[Tensor], group: Group) -> None:
    for index, t in enumerate(tensors):
        writable(call, f"tensors[{index}]", t, group)


def _cut(pack: _Pack, output: Tensor) -> list[Tensor]:
    parts = torch.split(output, pack.lengths())
    return [part.view(t.shape) for part, t in zip(parts, pack.tensors, strict=True)]


def _new_tensors(
    packs: list[_Pack],
    packed: Callable[[_Pack], Tensor],
    output_for: Callable[[Tensor], Tensor],
    start: _Start,
    transpose: Callable[[Tensor], Tensor],
    cut: Callable[[_Pack, Tensor], list[Tensor]],
    async_op: bool,
) -> list[Tensor] | Work[list[Tensor]]:
    """Run ``start`` on every pack; the results in the order of the caller's list."""
    works: list[CoreWork | None] = []
    sources: list[Tensor] = []
    outputs: list[Tensor] = []
    for pack in packs:

        def function(source: Tensor, pack: _Pack = pack) -> Tensor:
            output = output_for(source)
            works.append(start(pack, source, output))
            return output

        source = packed(pack)
        sources.append(source)
        outputs.append(
            linear(source, function, transpose) if followed(source) else function(source)
        )

    def finish() -> list[Tensor]:
        results: dict[int, Tensor] = {}
        for pack, output in zip(packs, outputs, strict=True):
            results.update(zip(pack.places, cut(pack, output), strict=True))
        return [results[place] for place in range(len(results))]

    return outcome(_together(works, async_op), (sources, outputs), finish)


def _in_place(
    packs: list[_Pack], flats: list[Tensor], start: _Start, async_op: bool
) -> Work[None] | None:
    """Run ``start`` on every pack in its ``flats``, and copy those back into the tensors."""
    works = [start(pack, flat, flat) for pack, flat in zip(packs, flats, strict=True)]

    def finish() -> None:
        with torch.no_grad():
            for pack, flat in zip(packs, flats, strict=True):
                torch._foreach_copy_(pack.tensors, _cut(pack, flat))

    return outcome(_together(works, async_op), flats, finish)


def _together(works: list[CoreWork | None], async_op: bool) -> CoreWork | None:
    return Together([work for work in works if work is not None]) if async_op else None
