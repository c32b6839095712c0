"""Blocks from all ranks to one, and from one to all: each other's transposes."""

from typing import Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm import device
from pycomm._core import DType, Group
from pycomm.arguments import MOVABLE, fits_input, movable, refuse, root_rank, seconds
from pycomm.collectives.autograd import blocking_only, followed, linear
from pycomm.errors import InvalidArgumentError
from pycomm.memory import dense, memory_order, refuse_overlap, writable
from pycomm.runtime import group_of
from pycomm.work import Work, nothing, outcome

MAX_DIMS = 64  # of a tensor whose shape travels

_TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in MOVABLE.items()}


@overload
def gather(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor | None: ...
@overload
def gather(
    t: Tensor,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor | None]: ...
def gather(
    t: Tensor,
    root: int = 0,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor | None] | None:
    """Every rank's ``t``, stacked by rank, on ``root`` alone.

    Autograd follows it: rank ``r``'s gradient is row ``r`` of the root's.

    Args:
        t: same shape and dtype on every rank, any strides; left as it was.
        root: a rank of the group.
        group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        On the root a contiguous tensor of shape ``(p, *t.shape)`` for ``p`` ranks, elsewhere None;
        or a ``Work`` whose ``wait()`` returns that. If autograd follows, the others get an empty
        tensor instead of None, so that they can call ``result.sum().backward()`` as the root does.

    Raises:
        InvalidArgumentError: dtype, device or root; otherwise as for ``all_reduce``.
    """
    group = group_of(group)
    dtype = movable("gather", "t", t, group)
    root = root_rank("gather", root, group)
    if followed(t):
        blocking_only("gather", group, async_op)

        def function(t: Tensor) -> Tensor:
            stacked = gather(t, root, group=group, timeout_s=timeout_s)
            return t.new_empty(0) if stacked is None else stacked

        def transpose(gradient: Tensor) -> Tensor:
            rows = gradient if group.rank == root else None
            return scatter(rows, root, group=group, timeout_s=timeout_s)

        return linear(t, function, transpose)
    source = dense(t)
    output = t.new_empty((group.size, *t.shape)) if group.rank == root else None
    work = group.gather(
        source.data_ptr(),
        0 if output is None else output.data_ptr(),
        t.numel(),
        dtype,
        root,
        shape=t.shape,
        place=device.place_of(source),
        timeout_s=seconds("gather", timeout_s, group),
        async_op=async_op,
    )
    return outcome(work, (source, output), lambda: output)


@overload
def scatter(
    t: Tensor | None,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def scatter(
    t: Tensor | None,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor]: ...
def scatter(
    t: Tensor | None,
    root: int = 0,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """Row ``r`` of ``root``'s ``t``, on rank ``r``.

    Shape and dtype reach the other ranks by a small broadcast first, for which even an
    asynchronous call waits; ``scatter_into`` does without. Autograd follows it, on all ranks if the
    root's ``t`` requires a gradient: row ``r`` of its gradient is rank ``r``'s.

    Args:
        t: on the root, shape ``(p, *rest)`` for ``p`` ranks, any strides; left as it was. None or
            anything else on the other ranks, where it is not looked at.
        root: a rank of the group.
        group, timeout_s, async_op: as for ``all_reduce``.

    Returns:
        A contiguous tensor of shape ``rest``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        InvalidArgumentError: dtype, device, shape or root; otherwise as for ``all_reduce``. What is
            wrong with the root's ``t`` raises on every rank; the group stays usable.
    """
    group = group_of(group)
    root = root_rank("scatter", root, group)
    limit_s = seconds("scatter", timeout_s, group)
    card = torch.zeros(4 + MAX_DIMS, dtype=torch.int64)
    mistake: InvalidArgumentError | None = None
    if group.rank == root:
        try:
            _fill_card(card, t, group, async_op)
        except InvalidArgumentError as raised:
            mistake = raised
            card[:2] = torch.tensor([_REFUSED, len(str(mistake).encode())])
    _broadcast_of_scatter(card, root, group, limit_s)
    code, to_follow, on_gpu, dims, *sizes = card.tolist()
    if code == _REFUSED:
        _raise_everywhere(mistake, to_follow, root, group, limit_s)
    dtype, shape = DType(code), tuple(sizes[:dims])
    if t is not None and group.rank == root:
        new_empty = t.new_empty
    else:  # whatever t is here, it is not looked at
        kind = "cuda" if on_gpu else "cpu"
        new_empty = device.empty_like_remote(kind, _TORCH_DTYPES[dtype]).new_empty

    def scattered(t: Tensor | None) -> Tensor | Work[Tensor]:
        source = None if t is None else dense(t)
        output = new_empty(shape)
        work = group.scatter(
            0 if source is None else source.data_ptr(),
            output.data_ptr(),
            output.numel(),
            dtype,
            root,
            shape=shape,
            place=device.place_of(output),
            timeout_s=limit_s,
            async_op=async_op,
        )
        return outcome(work, (source, output), lambda: output)

    if not to_follow:
        return scattered(t if group.rank == root else None)

    def function(given: Tensor) -> Tensor:
        output = scattered(given if group.rank == root else None)
        assert isinstance(output, Tensor)
        return output

    def transpose(gradient: Tensor) -> Tensor | None:
        return gather(gradient, root, group=group, timeout_s=timeout_s)

    # On the other ranks autograd needs something to follow: an input of no elements.
    nobody = new_empty(0, requires_grad=True)
    return linear(t if t is not None and group.rank == root else nobody, function, transpose)


@overload
def scatter_into(
    output: Tensor,
    input: Tensor | None,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def scatter_into(
    output: Tensor,
    input: Tensor | None,
    root: int = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
def scatter_into(
    output: Tensor,
    input: Tensor | None,
    root: int = 0,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Write row ``r`` of ``root``'s ``input`` into rank ``r``'s ``output``. One message, no shapes.

    Args:
        output: same shape and dtype on every rank; its elements fill one piece of memory, in
            row-major order; overwritten. On the root it may be its own row of ``input``.
        input: on the root, shape ``(p, *output.shape)``, any strides; not looked at elsewhere.
        root: a rank of the group.
        group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: shape, dtype, device, root, strides or overlap; otherwise as for
            ``all_reduce_``.
    """
    group = group_of(group)
    call = "scatter_into"
    dtype = movable(call, "output", output, group)
    root = root_rank(call, root, group)
    writable(call, "output", output, group)
    if memory_order(call, "output", output, group):
        refuse(call, group, "output is not row-major. Pass output.contiguous() and copy it back.")
    source = None
    if group.rank == root:
        if input is None:
            refuse(call, group, "input is None on the root. Pass the tensor to cut up.")
        movable(call, "input", input, group)
        fits_input(call, output, input, group)
        if tuple(input.shape) != (group.size, *output.shape):
            refuse(
                call,
                group,
                f"input has shape {tuple(input.shape)}, and {group.size} ranks' outputs of shape "
                f"{tuple(output.shape)} need {(group.size, *output.shape)}.",
            )
        refuse_overlap(call, output, input, ("output", "input"), group)
        source = dense(input)
    work = group.scatter(
        0 if source is None else source.data_ptr(),
        output.data_ptr(),
        output.numel(),
        dtype,
        root,
        shape=output.shape,
        place=device.place_of(output),
        timeout_s=seconds(call, timeout_s, group),
        async_op=async_op,
    )
    increment_version(output)
    return outcome(work, (source, output), nothing)


def _check_rows(t: Tensor, group: Group) -> None:
    if t.dim() == 0 or t.shape[0] != group.size:
        refuse(
            "scatter",
            group,
            f"t has shape {tuple(t.shape)}, and {group.size} ranks need a row each.\n"
            f"  Pass a tensor of shape ({group.size}, ...), such as t.view({group.size}, -1).",
        )
    if t.dim() - 1 > MAX_DIMS:
        refuse(
            "scatter",
            group,
            f"t has {t.dim()} dimensions, and a shape of at most {MAX_DIMS + 1} can be sent.\n"
            "  Use scatter_into, whose ranks know the shape, or flatten t.",
        )


# In place of a dtype: the root has refused its tensor, and its words follow.
_REFUSED = -1


def _fill_card(card: Tensor, t: Tensor | None, group: Group, async_op: bool) -> None:
    """Write what the other ranks must know of the root's ``t``; raise if it cannot be cut up."""
    if t is None:
        refuse("scatter", group, "t is None on the root. Pass the tensor to cut up.")
    dtype = movable("scatter", "t", t, group)
    _check_rows(t, group)
    if followed(t):
        blocking_only("scatter", group, async_op)
    card[:4] = torch.tensor([dtype.value, followed(t), t.is_cuda, t.dim() - 1])
    card[4 : 3 + t.dim()] = torch.tensor(t.shape[1:])


def _raise_everywhere(
    mistake: InvalidArgumentError | None, length: int, root: int, group: Group, timeout_s: float
) -> NoReturn:
    """Raise the root's mistake, on the other ranks in its words."""
    text = torch.zeros(length, dtype=torch.uint8)
    if mistake is not None:
        text.copy_(torch.frombuffer(bytearray(str(mistake).encode()), dtype=torch.uint8))
    _broadcast_of_scatter(text, root, group, timeout_s)
    if mistake is not None:
        raise mistake
    raise InvalidArgumentError(
        f"scatter on rank {group.rank}: refused by the root: {text.numpy().tobytes().decode()}"
    )


def _broadcast_of_scatter(t: Tensor, root: int, group: Group, timeout_s: float) -> None:
    group.broadcast(
        t.data_ptr(),
        t.data_ptr(),
        t.numel(),
        MOVABLE[t.dtype],
        root,
        name="scatter's shape",
        timeout_s=timeout_s,
    )
