"""From one rank to all, and from all to one: each other's transposes."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm._core import Group, ReduceOp
from pycomm.arguments import (
    Precision,
    check_scales,
    movable,
    reducible,
    reduction_algorithm,
    root_rank,
    seconds,
)
from pycomm.collectives.autograd import (
    blocking_only,
    followed,
    gradient_factor,
    linear,
    linear_only,
)
from pycomm.device import place_of
from pycomm.memory import dense, laid_out_like, memory_order, writable
from pycomm.runtime import group_of
from pycomm.tensor_calls import shortened
from pycomm.work import Work, nothing, outcome


@overload
def broadcast(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def broadcast(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor]: ...
def broadcast(
    t: Tensor,
    root: int = 0,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """A new tensor with the elements of ``root``'s ``t``.

    Autograd follows it: the root's gradient is the sum of all ranks' gradients, that of the other
    ranks' ``t`` is zero. ``t`` then requires a gradient on every rank.

    Args:
        t: same shape and dtype on every rank, any strides; left as it was. Only the root's
            elements are read.
        root: a rank of the group.
        group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A tensor like ``t``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        InvalidArgumentError: dtype, device or root; otherwise as for ``all_reduce``.
    """
    group = group_of(group)
    dtype = movable("broadcast", "t", t, group)
    root = root_rank("broadcast", root, group)
    if followed(t):
        blocking_only("broadcast", group, async_op)
        return linear(
            t,
            lambda t: broadcast(t, root, group=group, timeout_s=timeout_s),
            lambda gradient: _sum_on_root(gradient, root, group, timeout_s),
        )
    wire = t.new_empty(t.shape)
    source = dense(t) if group.rank == root else wire
    work = group.broadcast(
        source.data_ptr(),
        wire.data_ptr(),
        t.numel(),
        dtype,
        root,
        shape=t.shape,
        place=place_of(wire),
        timeout_s=seconds("broadcast", timeout_s, group),
        async_op=async_op,
    )
    return outcome(work, (source, wire), lambda: laid_out_like(t, wire))


@overload
def broadcast_(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def broadcast_(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
@shortened
def broadcast_(
    t: Tensor,
    root: int = 0,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Overwrite every rank's ``t`` with the elements of ``root``'s.

    Args:
        t: same shape and dtype on every rank; its elements fill one piece of memory, which lies in
            the same order on every rank.
        root: a rank of the group.
        group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: dtype, device, root or strides; otherwise as for ``all_reduce_``.
    """
    group = group_of(group)
    dtype = movable("broadcast_", "t", t, group)
    writable("broadcast_", "t", t, group)
    work = group.broadcast(
        t.data_ptr(),
        t.data_ptr(),
        t.numel(),
        dtype,
        root_rank("broadcast_", root, group),
        shape=t.shape,
        name=memory_order("broadcast_", "t", t, group),
        place=place_of(t),
        timeout_s=seconds("broadcast_", timeout_s, group),
        async_op=async_op,
    )
    increment_version(t)
    return outcome(work, t, nothing)


@overload
def reduce(
    t: Tensor,
    root: int = ...,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor | None: ...
@overload
def reduce(
    t: Tensor,
    root: int = ...,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor | None]: ...
def reduce(
    t: Tensor,
    root: int = 0,
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    precision: Precision | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor | None] | None:
    """The element-wise ``op`` of every rank's ``t``, on ``root`` alone; the bits of ``all_reduce``.

    Autograd follows SUM and AVG: every rank's gradient is the root's, scaled as the input was.

    Args:
        t: same shape and dtype on every rank, any strides; left as it was.
        root: a rank of the group.
        op, prescale, postscale, precision, group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        On the root a tensor like ``t``, elsewhere None; or a ``Work`` whose ``wait()`` returns
        that. If autograd follows, the others get an empty tensor instead of None, so that they
        can call ``result.sum().backward()`` as the root does.

    Raises:
        InvalidArgumentError: dtype, device, op or root; otherwise as for ``all_reduce``.
    """
    group = group_of(group)
    dtype = reducible("reduce", "t", t, op, group)
    root = root_rank("reduce", root, group)
    if prescale != 1 or postscale != 1:
        check_scales("reduce", t, prescale, postscale, group)
    if followed(t):
        linear_only("reduce", op, group)
        blocking_only("reduce", group, async_op)
        shape, factor = t.shape, gradient_factor(op, prescale, postscale, group)

        def function(t: Tensor) -> Tensor:
            result = reduce(
                t,
                root,
                op,
                prescale=prescale,
                postscale=postscale,
                precision=precision,
                group=group,
                timeout_s=timeout_s,
            )
            return t.new_empty(0) if result is None else result

        def transpose(gradient: Tensor) -> Tensor:
            if group.rank != root:
                gradient = gradient.sum().expand(shape)  # of nothing, for the shape
            return broadcast(gradient, root, group=group, timeout_s=timeout_s) * factor

        return linear(t, function, transpose)
    source = dense(t)
    output = torch.empty_like(source) if group.rank == root else None
    work = group.reduce(
        source.data_ptr(),
        0 if output is None else output.data_ptr(),
        t.numel(),
        dtype,
        op,
        root,
        prescale=prescale,
        postscale=postscale,
        algorithm=reduction_algorithm("reduce", precision, group),
        shape=t.shape,
        place=place_of(source),
        timeout_s=seconds("reduce", timeout_s, group),
        async_op=async_op,
    )
    return outcome(
        work, (source, output), lambda: None if output is None else laid_out_like(t, output)
    )


@overload
def reduce_(
    t: Tensor,
    root: int = ...,
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
def reduce_(
    t: Tensor,
    root: int = ...,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
@shortened
def reduce_(
    t: Tensor,
    root: int = 0,
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    precision: Precision | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Replace ``root``'s ``t`` by the element-wise ``op`` of every rank's; the others keep theirs.

    Args:
        t: as for ``all_reduce_``, but left as it was on all ranks but the root.
        root: a rank of the group.
        op, prescale, postscale, precision, group, timeout_s, async_op: as for ``all_reduce_``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: dtype, device, op, root or strides; otherwise as for ``all_reduce_``.
    """
    group = group_of(group)
    dtype = reducible("reduce_", "t", t, op, group)
    root = root_rank("reduce_", root, group)
    if prescale != 1 or postscale != 1:
        check_scales("reduce_", t, prescale, postscale, group)
    writable("reduce_", "t", t, group)
    work = group.reduce(
        t.data_ptr(),
        t.data_ptr() if group.rank == root else 0,
        t.numel(),
        dtype,
        op,
        root,
        prescale=prescale,
        postscale=postscale,
        algorithm=reduction_algorithm("reduce_", precision, group),
        shape=t.shape,
        name=memory_order("reduce_", "t", t, group),
        place=place_of(t),
        timeout_s=seconds("reduce_", timeout_s, group),
        async_op=async_op,
    )
    if group.rank == root:
        increment_version(t)
    return outcome(work, t, nothing)


def _sum_on_root(gradient: Tensor, root: int, group: Group, timeout_s: float | None) -> Tensor:
    total = reduce(gradient, root, group=group, timeout_s=timeout_s)
    if group.rank == root:
        assert total is not None
        return total
    # An empty tensor where autograd follows the gradient itself: stay connected to it.
    return torch.zeros_like(gradient) if total is None else total.sum().expand(gradient.shape)
