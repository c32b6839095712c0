"""Collective operations on tensors."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm import tensor_calls
from pycomm._core import Group, ReduceOp
from pycomm.arguments import (
    memory_order,
    movable,
    reducible,
    refuse,
    root_rank,
    seconds,
    writable,
)
from pycomm.runtime import world_group
from pycomm.work import Work


@overload
def all_reduce(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def all_reduce(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor]: ...
def all_reduce(
    t: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """The element-wise ``op`` of every rank's ``t``, the same bits on every rank.

    The ranks of a host are folded in rank order, then the hosts' results in the order of their
    lowest ranks. float16 and bfloat16 are folded in float32 and rounded once. Autograd follows SUM
    and AVG: the gradient is the same reduction of the ranks' gradients, so every rank must call
    ``backward()`` too.

    Args:
        t: same shape and dtype on every rank, any strides; left as it was.
        op: ``AVG`` divides the sum once by the number of ranks and needs a floating dtype.
        group: the ranks taking part, the world if None; every one of them makes this call.
        timeout_s: seconds for the whole call, not per message; the group's default if None.
        async_op: return at once; leave ``t`` alone until ``Work.wait()``, which returns the result.

    Returns:
        A tensor like ``t`` (as ``torch.empty_like`` lays it out), or a ``Work``.

    Raises:
        InvalidArgumentError: dtype, device or op. Found before anything is sent; the group stays
            usable.
        MismatchError: a peer made a different call at this position. The group is finished.
        CommTimeoutError, PeerLostError: name the peer and step. The group is finished.
    """
    if group is None:
        group = world_group()
    if timeout_s is None and not async_op and type(t) is Tensor and not t.requires_grad:
        like_t = torch.empty_like(t)
        if tensor_calls.all_reduce(group, t, like_t, op):
            return like_t
    dtype = reducible("all_reduce", t, op, group)
    if t.requires_grad and torch.is_grad_enabled():
        if async_op or op not in (ReduceOp.SUM, ReduceOp.AVG):
            refuse(
                "all_reduce",
                group,
                "t requires a gradient, and autograd follows only a blocking SUM or AVG.\n"
                "  Pass t.detach() if no gradient is wanted.",
            )
        result: Tensor = _DifferentiableAllReduce.apply(t, op, group, timeout_s)  # type: ignore[no-untyped-call]
        return result
    source = t.resolve_neg().contiguous()
    output = torch.empty_like(source)
    work = group.all_reduce(
        source.data_ptr(),
        output.data_ptr(),
        t.numel(),
        dtype,
        op,
        shape=t.shape,
        timeout_s=seconds("all_reduce", timeout_s, group),
        async_op=async_op,
    )
    if work is None:
        return _laid_out_like(t, output)
    return Work(work, (source, output), lambda: _laid_out_like(t, output))


def all_reduce_(
    t: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Replace ``t`` by the element-wise ``op`` of every rank's ``t``, as ``all_reduce`` does.

    Args:
        t: overwritten; its elements fill one piece of memory (contiguous, channels-last, ...),
            which lies in the same order on every rank.
        op, group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: dtype, device, op or strides; or ``t`` is part of an autograd graph.
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``; ``t`` is then
            unspecified.
    """
    if group is None:
        group = world_group()
    if timeout_s is None and not async_op and tensor_calls.all_reduce(group, t, t, op):
        return None
    dtype = reducible("all_reduce_", t, op, group)
    writable("all_reduce_", "t", t, group)
    address = t.data_ptr()
    work = group.all_reduce(
        address,
        address,
        t.numel(),
        dtype,
        op,
        shape=t.shape,
        name=memory_order("all_reduce_", "t", t, group),
        timeout_s=seconds("all_reduce_", timeout_s, group),
        async_op=async_op,
    )
    increment_version(t)
    return None if work is None else Work(work, t, _nothing)


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
    """A new tensor with the elements of ``root``'s ``t``. Autograd does not follow it.

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
    if group is None:
        group = world_group()
    dtype, count, name = movable("broadcast", "t", t, group)
    root = root_rank("broadcast", root, group)
    wire = torch.empty(t.shape, dtype=t.dtype)
    if group.rank == root:
        wire.copy_(t.detach())
    work = group.broadcast(
        wire.data_ptr(),
        wire.data_ptr(),
        count,
        dtype,
        root,
        shape=t.shape,
        name=name,
        timeout_s=seconds("broadcast", timeout_s, group),
        async_op=async_op,
    )
    if work is None:
        return _laid_out_like(t, wire)
    return Work(work, wire, lambda: _laid_out_like(t, wire))


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
    if group is None:
        group = world_group()
    dtype, count, name = movable("broadcast_", "t", t, group)
    writable("broadcast_", "t", t, group)
    work = group.broadcast(
        t.data_ptr(),
        t.data_ptr(),
        count,
        dtype,
        root_rank("broadcast_", root, group),
        shape=t.shape,
        name=name + memory_order("broadcast_", "t", t, group),
        timeout_s=seconds("broadcast_", timeout_s, group),
        async_op=async_op,
    )
    increment_version(t)
    return None if work is None else Work(work, t, _nothing)


@overload
def all_gather(
    t: Tensor,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def all_gather(
    t: Tensor,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor]: ...
def all_gather(
    t: Tensor,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """Every rank's ``t``, stacked by rank. Autograd does not follow it.

    Args:
        t: same shape and dtype on every rank, any strides; left as it was.
        group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor of shape ``(p, *t.shape)`` for ``p`` ranks, or a ``Work`` whose
        ``wait()`` returns it.

    Raises:
        InvalidArgumentError: dtype or device; otherwise as for ``all_reduce``.
    """
    if group is None:
        group = world_group()
    dtype, count, name = movable("all_gather", "t", t, group)
    source = t.detach().resolve_conj().resolve_neg().contiguous()
    output = torch.empty((group.size, *t.shape), dtype=t.dtype)
    work = group.all_gather(
        source.data_ptr(),
        output.data_ptr(),
        count,
        dtype,
        shape=t.shape,
        name=name,
        timeout_s=seconds("all_gather", timeout_s, group),
        async_op=async_op,
    )
    return output if work is None else Work(work, (source, output), lambda: output)


def all_gather_into(
    output: Tensor,
    input: Tensor,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Write every rank's ``input`` into ``output``, by rank.

    Args:
        output: shape ``(p, *input.shape)`` or, the same memory, ``(p*k, *rest)`` for ``input`` of
            shape ``(k, *rest)``; contiguous; overwritten. ``input`` may be a part of it.
        input: same shape and dtype on every rank, any strides.
        group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: shape, dtype, device or strides; otherwise as for ``all_reduce_``.
    """
    if group is None:
        group = world_group()
    dtype, count, name = movable("all_gather_into", "input", input, group)
    movable("all_gather_into", "output", output, group)
    writable("all_gather_into", "output", output, group)
    _check_gather_output(output, input, group)
    source = input.detach().resolve_conj().resolve_neg().contiguous()
    if source.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
        source = source.clone()
    work = group.all_gather(
        source.data_ptr(),
        output.data_ptr(),
        count,
        dtype,
        shape=input.shape,
        name=name,
        timeout_s=seconds("all_gather_into", timeout_s, group),
        async_op=async_op,
    )
    increment_version(output)
    return None if work is None else Work(work, (source, output), _nothing)


def barrier(
    *, group: Group | None = None, timeout_s: float | None = None, async_op: bool = False
) -> Work[None] | None:
    """Return once every rank has made this call.

    Args:
        group, timeout_s: as for ``all_reduce``.
        async_op: return at once with a ``Work`` whose ``wait()`` is the barrier.

    Raises:
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``.
    """
    if group is None:
        group = world_group()
    if timeout_s is None and not async_op:
        group.barrier()
        return None
    work = group.barrier(timeout_s=seconds("barrier", timeout_s, group), async_op=async_op)
    return None if work is None else Work(work, None, _nothing)


class _DifferentiableAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, op: ReduceOp, group: Group, timeout_s: float | None) -> Tensor:
        ctx.op, ctx.group, ctx.timeout_s = op, group, timeout_s
        return all_reduce(t, op, group=group, timeout_s=timeout_s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # The sum of all ranks' losses depends on this rank's t through every rank's result.
        (gradient,) = gradients
        reduced = all_reduce(gradient, ctx.op, group=ctx.group, timeout_s=ctx.timeout_s)
        return reduced, None, None, None


def _check_gather_output(output: Tensor, input: Tensor, group: Group) -> None:
    stacked = (group.size, *input.shape)
    shapes = [stacked]
    if input.dim() > 0:
        shapes.append((group.size * input.shape[0], *input.shape[1:]))
    problem = ""
    if tuple(output.shape) not in shapes:
        problem = (
            f"output has shape {tuple(output.shape)}, and {group.size} ranks' inputs of shape "
            f"{tuple(input.shape)} need {' or '.join(map(str, shapes))}."
        )
    elif output.dtype != input.dtype:
        problem = f"output has {output.dtype} and input has {input.dtype}."
    elif not output.is_contiguous():
        problem = f"output of shape {tuple(output.shape)} has strides {output.stride()}."
    if problem:
        remedy = f"torch.empty({stacked}, dtype={input.dtype})"
        refuse("all_gather_into", group, f"{problem}\n  Pass a contiguous output: {remedy}.")


def _laid_out_like(t: Tensor, wire: Tensor) -> Tensor:
    """``wire``, a contiguous tensor, in the memory format of ``t``."""
    return wire if t.is_contiguous() else torch.empty_like(t).copy_(wire)


def _nothing() -> None:
    return None
