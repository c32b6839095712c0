"""Reductions of many tensors as one operation for each of their dtypes."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pycomm._core import Algorithm, Group, ReduceOp
from pycomm.arguments import (
    Precision,
    check_scales,
    divided,
    reducible,
    reduction_algorithm,
    seconds,
)
from pycomm.collectives.all_reduce import all_reduce
from pycomm.collectives.autograd import followed, gradient_factor, linear_only
from pycomm.collectives.packs import (
    Pack,
    Start,
    check_blocking,
    check_writable,
    in_place,
    new_tensors,
    packs_of,
)
from pycomm.collectives.shards import all_gather
from pycomm.device import place_of
from pycomm.runtime import group_of
from pycomm.work import CoreWork, Work


@overload
def all_reduce_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
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
    precision: Precision | None = ...,
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
    precision: Precision | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> list[Tensor] | Work[list[Tensor]]:
    """``[all_reduce(t, op) for t in tensors]`` as one operation for each dtype, with equal bits.

    Autograd follows it as it follows ``all_reduce``.

    Args:
        tensors: the same shapes and dtypes in the same order on every rank, any strides.
        op, prescale, postscale, precision, group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor for each of ``tensors``, parts of one piece of memory for each dtype; or
        a ``Work`` whose ``wait()`` returns them.

    Raises:
        As ``all_reduce`` does. Nothing is sent unless all tensors are in order.
    """
    group = group_of(group)
    call = "all_reduce_grouped"
    packs = _reducible_packs(call, tensors, op, prescale, postscale, group, async_op)
    limit_s = seconds(call, timeout_s, group)
    algorithm = reduction_algorithm(call, precision, group)
    start = _all_reduction(op, prescale, postscale, algorithm, group, limit_s, async_op)

    def transpose(gradient: Tensor) -> Tensor:
        return all_reduce(
            gradient,
            op,
            prescale=prescale,
            postscale=postscale,
            precision=precision,
            group=group,
            timeout_s=timeout_s,
        )

    return new_tensors(
        packs, Pack.flat, torch.empty_like, start, transpose, Pack.cut, group, limit_s, async_op
    )


@overload
def all_reduce_grouped_(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
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
    precision: Precision | None = ...,
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
    precision: Precision | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Replace each tensor by its reduction, as ``all_reduce_grouped`` does.

    Args:
        tensors: the same shapes and dtypes in the same order on every rank, any strides without
            overlap; overwritten.
        op, prescale, postscale, precision, group, timeout_s: as for ``all_reduce``.
        async_op: return at once; ``Work.wait()`` writes the results into ``tensors``.

    Returns:
        None, or a ``Work``.

    Raises:
        As ``all_reduce_`` does. Nothing is sent unless all tensors are in order; they
        keep what they held if the operation fails.
    """
    group = group_of(group)
    call = "all_reduce_grouped_"
    packs = packs_of(
        call, tensors, group, lambda argument, t: reducible(call, argument, t, op, group)
    )
    check_writable(call, tensors, group)
    _check_scales(call, tensors, prescale, postscale, group)
    limit_s = seconds(call, timeout_s, group)
    algorithm = reduction_algorithm(call, precision, group)
    start = _all_reduction(op, prescale, postscale, algorithm, group, limit_s, async_op)
    flats = [pack.flat().detach() for pack in packs]
    return in_place(packs, flats, start, group, limit_s, async_op)


@overload
def reduce_scatter_grouped(
    tensors: Sequence[Tensor],
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
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
    precision: Precision | None = ...,
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
    precision: Precision | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> list[Tensor] | Work[list[Tensor]]:
    """``[reduce_scatter(t, op) for t in tensors]`` as one operation for each dtype.

    Autograd follows it as it follows ``reduce_scatter``.

    Args:
        tensors: each of shape ``(p*k, *rest)`` with a ``k`` and ``rest`` of its own; the same
            shapes and dtypes in the same order on every rank, any strides.
        op, prescale, postscale, precision, group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor of shape ``(k, *rest)`` for each of ``tensors``, parts of one piece of
        memory for each dtype; or a ``Work`` whose ``wait()`` returns them.

    Raises:
        As ``reduce_scatter`` does. Nothing is sent unless all tensors are in order.
    """
    group = group_of(group)
    call = "reduce_scatter_grouped"
    packs = _reducible_packs(call, tensors, op, prescale, postscale, group, async_op)
    for index, t in enumerate(tensors):
        divided(call, f"tensors[{index}]", t, group)
    limit_s = seconds(call, timeout_s, group)
    algorithm = reduction_algorithm(call, precision, group)
    p, factor = group.size, gradient_factor(op, prescale, postscale, group)

    def packed(pack: Pack) -> Tensor:
        """Row ``r``: rank ``r``'s shards, end to end."""
        return torch.cat([t.reshape(p, t.numel() // p) for t in pack.tensors], dim=1)

    def start(pack: Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.reduce_scatter(
            source.data_ptr(),
            output.data_ptr(),
            output.numel(),
            pack.dtype,
            op,
            prescale=prescale,
            postscale=postscale,
            algorithm=algorithm,
            name=pack.name,
            place=place_of(output),
            timeout_s=limit_s,
            async_op=async_op,
        )

    def transpose(gradient: Tensor) -> Tensor:
        return all_gather(gradient, group=group, timeout_s=timeout_s) * factor

    def cut(pack: Pack, output: Tensor) -> list[Tensor]:
        parts = torch.split(output, [length // p for length in pack.lengths()])
        return [
            part.view(t.shape[0] // p, *t.shape[1:])
            for part, t in zip(parts, pack.tensors, strict=True)
        ]

    def output_for(rows: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[1])

    return new_tensors(packs, packed, output_for, start, transpose, cut, group, limit_s, async_op)


def _all_reduction(
    op: ReduceOp,
    prescale: float,
    postscale: float,
    algorithm: Algorithm,
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Start:
    def start(pack: Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.all_reduce(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            pack.dtype,
            op,
            prescale=prescale,
            postscale=postscale,
            algorithm=algorithm,
            name=pack.name,
            place=place_of(output),
            timeout_s=timeout_s,
            async_op=async_op,
        )

    return start


def _reducible_packs(
    call: str,
    tensors: Sequence[Tensor],
    op: ReduceOp,
    prescale: float,
    postscale: float,
    group: Group,
    async_op: bool,
) -> list[Pack]:
    packs = packs_of(
        call, tensors, group, lambda argument, t: reducible(call, argument, t, op, group)
    )
    _check_scales(call, tensors, prescale, postscale, group)
    check_blocking(call, tensors, group, async_op)
    if any(map(followed, tensors)):
        linear_only(call, op, group)
    return packs


def _check_scales(
    call: str, tensors: Sequence[Tensor], prescale: float, postscale: float, group: Group
) -> None:
    if prescale != 1 or postscale != 1:
        for t in tensors:
            check_scales(call, t, prescale, postscale, group)
