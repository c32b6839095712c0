"""All-reduce, which is its own transpose."""

import functools
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm import tensor_calls
from pycomm._core import Algorithm, Group, ReduceOp
from pycomm.arguments import Precision, check_scales, reducible, reduction_algorithm, seconds
from pycomm.collectives.autograd import blocking_only, followed, linear, linear_only
from pycomm.device import place_of
from pycomm.memory import dense, laid_out_like, memory_order, writable
from pycomm.runtime import group_of
from pycomm.work import Work, nothing, outcome


@overload
def all_reduce(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    algorithm: Algorithm | str | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def all_reduce(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    algorithm: Algorithm | str | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor]: ...
def all_reduce(
    t: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    precision: Precision | None = None,
    algorithm: Algorithm | str | None = None,
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
        op: ``AVG`` divides the sum once by the number of ranks and needs a floating or complex
            dtype; BAND, BOR and BXOR need integers or bool; complex numbers have SUM and AVG. MIN
            and MAX of a NaN and a number are NaN. For bool, SUM is "or" and PROD is "and".
        prescale, postscale: factors of every input and of the result, the same on every rank,
            applied where the sum is accumulated, before its one rounding. Floating and complex
            dtypes only.
        precision: "exact_order" makes CUDA tensors be folded as CPU tensors are: in that order,
            rounded once, the same bits at every message size. None leaves them to NCCL, which
            rounds 16-bit floats at every hop, in an order of its own choice. CPU tensors have that
            order anyway, unless by the ring, which is then refused.
        algorithm: between hosts "direct", "ring" or "gather_fold"; the cost model's choice if
            None. All but the ring give the same bits. On GPUs it is NCCL's choice.
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
    group = group_of(group)
    ordinary = (
        type(t) is Tensor
        and t.is_cpu
        and t.layout is torch.strided
        and not t.requires_grad
        and timeout_s is None
        and algorithm is None
        and precision is None
        and prescale == 1
        and postscale == 1
        and not async_op
    )
    if ordinary:
        like_t = torch.empty_like(t)
        if tensor_calls.all_reduce(group, t, like_t, op):
            return like_t
    dtype = reducible("all_reduce", "t", t, op, group)
    if prescale != 1 or postscale != 1:
        check_scales("all_reduce", t, prescale, postscale, group)
    if followed(t):
        linear_only("all_reduce", op, group)
        blocking_only("all_reduce", group, async_op)
        again = functools.partial(
            all_reduce,
            op=op,
            prescale=prescale,
            postscale=postscale,
            precision=precision,
            algorithm=algorithm,
            group=group,
            timeout_s=timeout_s,
        )
        return linear(t, again, again)
    source = dense(t)
    output = torch.empty_like(source)
    work = group.all_reduce(
        source.data_ptr(),
        output.data_ptr(),
        t.numel(),
        dtype,
        op,
        prescale=prescale,
        postscale=postscale,
        algorithm=reduction_algorithm("all_reduce", precision, group, algorithm),
        shape=t.shape,
        place=place_of(output),
        timeout_s=seconds("all_reduce", timeout_s, group),
        async_op=async_op,
    )
    return outcome(work, (source, output), lambda: laid_out_like(t, output))


@overload
def all_reduce_(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    algorithm: Algorithm | str | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def all_reduce_(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    algorithm: Algorithm | str | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
@tensor_calls.shortened
def all_reduce_(
    t: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    precision: Precision | None = None,
    algorithm: Algorithm | str | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Replace ``t`` by the element-wise ``op`` of every rank's ``t``, as ``all_reduce`` does.

    Args:
        t: overwritten; its elements fill one piece of memory (contiguous, channels-last, ...),
            which lies in the same order on every rank.
        op, prescale, postscale, precision, algorithm, group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: dtype, device, op or strides; or ``t`` is part of an autograd graph.
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``; ``t`` is then
            unspecified.
    """
    group = group_of(group)
    dtype = reducible("all_reduce_", "t", t, op, group)
    if prescale != 1 or postscale != 1:
        check_scales("all_reduce_", t, prescale, postscale, group)
    writable("all_reduce_", "t", t, group)
    address = t.data_ptr()
    work = group.all_reduce(
        address,
        address,
        t.numel(),
        dtype,
        op,
        prescale=prescale,
        postscale=postscale,
        algorithm=reduction_algorithm("all_reduce_", precision, group, algorithm),
        shape=t.shape,
        name=memory_order("all_reduce_", "t", t, group),
        place=place_of(t),
        timeout_s=seconds("all_reduce_", timeout_s, group),
        async_op=async_op,
    )
    increment_version(t)
    return outcome(work, t, nothing)
