"""Moves of many tensors as one operation for each of their dtypes."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pycomm._core import Group
from pycomm.arguments import movable, root_rank, seconds
from pycomm.collectives.packs import (
    Pack,
    check_blocking,
    check_writable,
    in_place,
    new_tensors,
    packs_of,
)
from pycomm.collectives.shards import reduce_scatter
from pycomm.device import place_of
from pycomm.runtime import group_of
from pycomm.work import CoreWork, Work


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
    group = group_of(group)
    call = "broadcast_grouped_"
    packs = packs_of(call, tensors, group, lambda argument, t: movable(call, argument, t, group))
    check_writable(call, tensors, group)
    root = root_rank(call, root, group)
    limit_s = seconds(call, timeout_s, group)

    def start(pack: Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.broadcast(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            pack.dtype,
            root,
            name=pack.name,
            place=place_of(output),
            timeout_s=limit_s,
            async_op=async_op,
        )

    if group.rank == root:
        flats = [pack.flat().detach() for pack in packs]
    else:
        flats = [pack.tensors[0].new_empty(sum(pack.lengths())) for pack in packs]
    return in_place(packs, flats, start, group, limit_s, async_op)


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
    group = group_of(group)
    call = "all_gather_grouped"
    packs = packs_of(call, tensors, group, lambda argument, t: movable(call, argument, t, group))
    check_blocking(call, tensors, group, async_op)
    limit_s = seconds(call, timeout_s, group)
    p = group.size

    def start(pack: Pack, source: Tensor, output: Tensor) -> CoreWork | None:
        return group.all_gather(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            pack.dtype,
            name=pack.name,
            place=place_of(output),
            timeout_s=limit_s,
            async_op=async_op,
        )

    def transpose(gradient: Tensor) -> Tensor:
        return reduce_scatter(gradient, group=group, timeout_s=timeout_s)[0]

    def cut(pack: Pack, output: Tensor) -> list[Tensor]:
        # Each rank's elements of one tensor are a column: copied, so that results are contiguous.
        columns = torch.split(output, pack.lengths(), dim=1)
        return [
            column.contiguous().view(p, *t.shape)
            for column, t in zip(columns, pack.tensors, strict=True)
        ]

    def output_for(flat: Tensor) -> Tensor:
        return flat.new_empty((p, len(flat)))

    return new_tensors(
        packs, Pack.flat, output_for, start, transpose, cut, group, limit_s, async_op
    )
