"""Every rank's shard to all, and the sum of all to shards: each other's transposes."""

from typing import Literal, overload

from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm._core import Group, ReduceOp
from pycomm.arguments import (
    Precision,
    check_scales,
    divided,
    movable,
    reducible,
    reduction_algorithm,
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
from pycomm.memory import dense, given_output, refuse_overlap, writable
from pycomm.runtime import group_of
from pycomm.tensor_calls import shortened
from pycomm.work import Work, nothing, outcome


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
    """Every rank's ``t``, stacked by rank.

    Autograd follows it: rank ``r``'s gradient is the sum of row ``r`` of all ranks' gradients.

    Args:
        t: same shape and dtype on every rank, any strides; left as it was. ``all_gather_list`` is
            for shapes that differ.
        group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor of shape ``(p, *t.shape)`` for ``p`` ranks, or a ``Work`` whose
        ``wait()`` returns it.

    Raises:
        InvalidArgumentError: dtype or device; otherwise as for ``all_reduce``.
    """
    group = group_of(group)
    dtype = movable("all_gather", "t", t, group)
    if followed(t):
        blocking_only("all_gather", group, async_op)
        shape = t.shape

        def transpose(gradient: Tensor) -> Tensor:
            shard = reduce_scatter(gradient, group=group, timeout_s=timeout_s)
            return shard.reshape(shape)

        return linear(t, lambda t: all_gather(t, group=group, timeout_s=timeout_s), transpose)
    source = dense(t)
    output = t.new_empty((group.size, *t.shape))
    work = group.all_gather(
        source.data_ptr(),
        output.data_ptr(),
        t.numel(),
        dtype,
        shape=t.shape,
        place=place_of(output),
        timeout_s=seconds("all_gather", timeout_s, group),
        async_op=async_op,
    )
    return outcome(work, (source, output), lambda: output)


@overload
def all_gather_into(
    output: Tensor,
    input: Tensor,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def all_gather_into(
    output: Tensor,
    input: Tensor,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
@shortened
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
            shape ``(k, *rest)``; contiguous; overwritten.
        input: same shape and dtype on every rank, any strides. In-place use passes this rank's own
            place in ``output``; any other overlap is refused.
        group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: shape, dtype, device, strides or overlap; otherwise as for
            ``all_reduce_``.
    """
    group = group_of(group)
    call = "all_gather_into"
    dtype = movable(call, "input", input, group)
    movable(call, "output", output, group)
    writable(call, "output", output, group)
    p = group.size
    shapes = [(p, *input.shape)]
    if input.dim() > 0:
        shapes.append((p * input.shape[0], *input.shape[1:]))
    given_output(call, output, shapes, input, group)
    refuse_overlap(call, input, output, ("input", "output"), group)
    source = dense(input)
    work = group.all_gather(
        source.data_ptr(),
        output.data_ptr(),
        input.numel(),
        dtype,
        shape=input.shape,
        place=place_of(output),
        timeout_s=seconds(call, timeout_s, group),
        async_op=async_op,
    )
    increment_version(output)
    return outcome(work, (source, output), nothing)


@overload
def reduce_scatter(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def reduce_scatter(
    t: Tensor,
    op: ReduceOp = ...,
    *,
    prescale: float = ...,
    postscale: float = ...,
    precision: Precision | None = ...,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor]: ...
def reduce_scatter(
    t: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    precision: Precision | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """Shard ``r`` of the element-wise ``op`` of every rank's ``t``, on rank ``r``.

    The bits are those of ``all_reduce``. Autograd follows SUM and AVG: the gradient is all ranks'
    gradients, end to end, scaled as the input was.

    Args:
        t: shape ``(p*k, *rest)`` for ``p`` ranks, the same on every rank, any strides; left as it
            was.
        op, prescale, postscale, precision, group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor of shape ``(k, *rest)``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        InvalidArgumentError: shape, dtype, device or op; otherwise as for ``all_reduce``.
    """
    group = group_of(group)
    dtype = reducible("reduce_scatter", "t", t, op, group)
    rows = divided("reduce_scatter", "t", t, group)
    if prescale != 1 or postscale != 1:
        check_scales("reduce_scatter", t, prescale, postscale, group)
    if followed(t):
        linear_only("reduce_scatter", op, group)
        blocking_only("reduce_scatter", group, async_op)
        factor = gradient_factor(op, prescale, postscale, group)
        return linear(
            t,
            lambda t: reduce_scatter(
                t,
                op,
                prescale=prescale,
                postscale=postscale,
                precision=precision,
                group=group,
                timeout_s=timeout_s,
            ),
            lambda gradient: (
                all_gather(gradient, group=group, timeout_s=timeout_s).flatten(0, 1) * factor
            ),
        )
    source = dense(t)
    output = t.new_empty((rows, *t.shape[1:]))
    work = group.reduce_scatter(
        source.data_ptr(),
        output.data_ptr(),
        output.numel(),
        dtype,
        op,
        prescale=prescale,
        postscale=postscale,
        algorithm=reduction_algorithm("reduce_scatter", precision, group),
        shape=t.shape,
        place=place_of(output),
        timeout_s=seconds("reduce_scatter", timeout_s, group),
        async_op=async_op,
    )
    return outcome(work, (source, output), lambda: output)


@overload
def reduce_scatter_into(
    output: Tensor,
    input: Tensor,
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
def reduce_scatter_into(
    output: Tensor,
    input: Tensor,
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
def reduce_scatter_into(
    output: Tensor,
    input: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
    precision: Precision | None = None,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Reduce ``input`` across the group; rank ``r`` keeps shard ``r`` of the result.

    With ``p`` ranks and ``k = output.shape[0]``, rank ``r`` ends with the element-wise ``op`` of
    every rank's ``input[r*k : (r+1)*k]``.

    Args:
        output: shape ``(k, *rest)``; contiguous; overwritten. In-place use passes the view
            ``input[r*k : (r+1)*k]``; any other overlap with ``input`` is refused.
        input: shape ``(p*k, *rest)``, the same on every rank, any strides; dtype of ``output``.
            Apart from an in-place ``output`` it is left as it was.
        op, prescale, postscale, precision, group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: shape, dtype, device, op, strides or overlap; otherwise as for
            ``all_reduce_``.

    Cost for ``n`` input bytes: (p-1)/p n sent and folded by each rank; see docs/cost-model.md.
    """
    group = group_of(group)
    call = "reduce_scatter_into"
    dtype = reducible(call, "input", input, op, group)
    movable(call, "output", output, group)
    rows = divided(call, "input", input, group)
    if prescale != 1 or postscale != 1:
        check_scales(call, input, prescale, postscale, group)
    writable(call, "output", output, group)
    given_output(call, output, [(rows, *input.shape[1:])], input, group)
    refuse_overlap(call, output, input, ("output", "input"), group)
    source = dense(input)
    work = group.reduce_scatter(
        source.data_ptr(),
        output.data_ptr(),
        output.numel(),
        dtype,
        op,
        prescale=prescale,
        postscale=postscale,
        algorithm=reduction_algorithm(call, precision, group),
        shape=input.shape,
        place=place_of(output),
        timeout_s=seconds(call, timeout_s, group),
        async_op=async_op,
    )
    increment_version(output)
    return outcome(work, (source, output), nothing)
