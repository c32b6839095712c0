"""Gathers of tensors whose shapes differ from rank to rank."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from pycomm._core import DType, Group
from pycomm.arguments import movable, refuse, root_rank, seconds
from pycomm.collectives.all_to_all import all_to_all
from pycomm.collectives.autograd import blocking_only, followed, linear
from pycomm.collectives.gather_scatter import MAX_DIMS
from pycomm.device import place_of
from pycomm.memory import dense
from pycomm.runtime import group_of
from pycomm.work import CoreWork, Work, outcome


@overload
def all_gather_list(
    t: Tensor,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> list[Tensor]: ...
@overload
def all_gather_list(
    t: Tensor,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[list[Tensor]]: ...
def all_gather_list(
    t: Tensor,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> list[Tensor] | Work[list[Tensor]]:
    """Every rank's ``t``, by rank; their shapes may differ.

    The ranks tell each other their shapes first, for which even an asynchronous call waits.
    Autograd follows it: a rank's gradient is the sum of all ranks' gradients of its tensor.

    Args:
        t: any shape, the same dtype on every rank, any strides; left as it was.
        group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        Contiguous tensors, parts of one piece of memory; or a ``Work`` whose ``wait()`` returns
        them.

    Raises:
        InvalidArgumentError: dtype, device or more than 64 dimensions; otherwise as for
            ``all_reduce``.
    """
    group = group_of(group)
    call = "all_gather_list"
    dtype = movable(call, "t", t, group)
    if followed(t):
        blocking_only(call, group, async_op)
    limit_s = seconds(call, timeout_s, group)
    shapes = _shapes_of_all(call, t, group, limit_s)
    counts = [math.prod(shape) for shape in shapes]
    output = t.new_empty(sum(counts))

    def start(source: Tensor) -> CoreWork | None:
        return group.all_gather(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            dtype,
            output_counts=counts,
            name=call,
            place=place_of(output),
            timeout_s=limit_s,
            async_op=async_op,
        )

    if followed(t):

        def function(flat: Tensor) -> Tensor:
            start(dense(flat))
            return output

        def transpose(gradient: Tensor) -> Tensor:
            mine = [t.numel()] * group.size
            parts = all_to_all(gradient, counts, mine, group=group, timeout_s=timeout_s)
            return parts.view(group.size, t.numel()).sum(0)

        return _cut(linear(t.reshape(-1), function, transpose), shapes)
    source = dense(t)
    return outcome(start(source), (source, output), lambda: _cut(output, shapes))


@overload
def gather_list(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> list[Tensor] | None: ...
@overload
def gather_list(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[list[Tensor] | None]: ...
def gather_list(
    t: Tensor,
    root: int = 0,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> list[Tensor] | Work[list[Tensor] | None] | None:
    """Every rank's ``t``, by rank, on ``root`` alone; their shapes may differ.

    Autograd does not follow it: ``all_gather_list`` is for that.

    Args:
        t, group, timeout_s, async_op: as for ``all_gather_list``.
        root: a rank of the group.

    Returns:
        On the root contiguous tensors, parts of one piece of memory, elsewhere None; or a ``Work``
        whose ``wait()`` returns that.

    Raises:
        InvalidArgumentError: as for ``all_gather_list``; a wrong root; a tensor that requires a
            gradient.
    """
    group = group_of(group)
    call = "gather_list"
    dtype = movable(call, "t", t, group)
    root = root_rank(call, root, group)
    if followed(t):
        refuse(
            call,
            group,
            "t requires a gradient, and autograd does not follow this call.\n"
            "  Pass t.detach(), or use all_gather_list(t), which autograd follows.",
        )
    limit_s = seconds(call, timeout_s, group)
    shapes = _shapes_of_all(call, t, group, limit_s)
    counts = [math.prod(shape) for shape in shapes]
    source = dense(t)
    output = t.new_empty(sum(counts)) if group.rank == root else None
    work = group.gather(
        source.data_ptr(),
        0 if output is None else output.data_ptr(),
        t.numel(),
        dtype,
        root,
        output_counts=counts,
        name=call,
        place=place_of(source),
        timeout_s=limit_s,
        async_op=async_op,
    )
    return outcome(work, (source, output), lambda: None if output is None else _cut(output, shapes))


def _shapes_of_all(call: str, t: Tensor, group: Group, timeout_s: float) -> list[tuple[int, ...]]:
    """Every rank's shape; the name of the exchange makes ranks with other dtypes a mismatch."""
    if t.dim() > MAX_DIMS:
        refuse(
            call,
            group,
            f"t has {t.dim()} dimensions, and a shape of at most {MAX_DIMS} can be sent.\n"
            "  Flatten t.",
        )
    mine = torch.zeros(1 + MAX_DIMS, dtype=torch.int64)
    mine[: 1 + t.dim()] = torch.tensor([t.dim(), *t.shape])
    cards = torch.empty(group.size, len(mine), dtype=torch.int64)
    group.all_gather(
        mine.data_ptr(),
        cards.data_ptr(),
        len(mine),
        DType.INT64,
        name=f"{call} of {t.dtype}: shapes",
        timeout_s=timeout_s,
    )
    return [tuple(sizes[:dims]) for dims, *sizes in cards.tolist()]


def _cut(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
