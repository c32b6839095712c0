"""All-to-all, which is its own transpose with the splits exchanged."""

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm._core import DType, Group
from pycomm.arguments import divided, fits_input, movable, refuse, seconds, splits_of
from pycomm.collectives.autograd import blocking_only, followed, linear
from pycomm.device import place_of
from pycomm.memory import dense, refuse_any_overlap, writable
from pycomm.runtime import group_of
from pycomm.tensor_calls import shortened
from pycomm.work import CoreWork, Work, nothing, outcome

_ANY = -1  # in a signature's shape: may differ from rank to rank


@overload
def all_to_all(
    t: Tensor,
    input_splits: Sequence[int] | None = ...,
    output_splits: Sequence[int] | None = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def all_to_all(
    t: Tensor,
    input_splits: Sequence[int] | None = ...,
    output_splits: Sequence[int] | None = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[Tensor]: ...
def all_to_all(
    t: Tensor,
    input_splits: Sequence[int] | None = None,
    output_splits: Sequence[int] | None = None,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """Block ``r`` of ``t`` goes to rank ``r``; what arrives lies end to end, by sender.

    Blocks are cut from dimension 0. Autograd follows it: gradients go back to where their elements
    came from.

    Args:
        t: shape ``(rows, *rest)``, the same ``rest`` on every rank, any strides; left as it was.
        input_splits: rows for each rank; equal blocks if None.
        output_splits: rows from each rank. If None, and ``input_splits`` are given, the ranks
            tell each other first, for which even an asynchronous call waits.
        group, timeout_s, async_op: as for ``all_reduce``. Which of the splits are given must be
            the same on every rank.

    Returns:
        A contiguous tensor of shape ``(sum(output_splits), *rest)``, or a ``Work`` whose
        ``wait()`` returns it.

    Raises:
        InvalidArgumentError: shape, dtype, device or splits; otherwise as for ``all_reduce``.
    """
    group = group_of(group)
    call = "all_to_all"
    dtype = movable(call, "t", t, group)
    limit_s = seconds(call, timeout_s, group)
    if followed(t):
        blocking_only(call, group, async_op)
    input_rows, output_rows = _rows(call, t, input_splits, output_splits, group, limit_s)
    if followed(t):
        # A transpose of equal blocks has equal blocks.
        there, back = (None, None) if input_rows is None else (input_rows, output_rows)
        return linear(
            t,
            lambda t: all_to_all(t, there, back, group=group, timeout_s=timeout_s),
            lambda gradient: all_to_all(gradient, back, there, group=group, timeout_s=timeout_s),
        )
    source = dense(t)
    rows = t.shape[0] if output_rows is None else sum(output_rows)
    output = t.new_empty((rows, *t.shape[1:]))
    work = _start(source, output, dtype, input_rows, output_rows, group, limit_s, async_op)
    return outcome(work, (source, output), lambda: output)


@overload
def all_to_all_into(
    output: Tensor,
    input: Tensor,
    input_splits: Sequence[int] | None = ...,
    output_splits: Sequence[int] | None = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def all_to_all_into(
    output: Tensor,
    input: Tensor,
    input_splits: Sequence[int] | None = ...,
    output_splits: Sequence[int] | None = ...,
    *,
    group: Group | None = ...,
    timeout_s: float | None = ...,
    async_op: Literal[True],
) -> Work[None]: ...
@shortened
def all_to_all_into(
    output: Tensor,
    input: Tensor,
    input_splits: Sequence[int] | None = None,
    output_splits: Sequence[int] | None = None,
    *,
    group: Group | None = None,
    timeout_s: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """Write what ``all_to_all(input, input_splits, output_splits)`` returns into ``output``.

    Args:
        output: the shape of the result; contiguous; dtype of ``input``; memory of its own.
        input: shape ``(rows, *rest)``, the same ``rest`` on every rank, any strides.
        input_splits: rows for each rank; equal blocks if None.
        output_splits: rows from each rank; equal blocks of ``output`` if None. Nothing is
            exchanged first.
        group, timeout_s: as for ``all_reduce``.
        async_op: return at once; the result is valid after ``Work.wait()``.

    Returns:
        None, or a ``Work``.

    Raises:
        InvalidArgumentError: shape, dtype, device, splits, strides or overlap; otherwise as for
            ``all_reduce_``.
    """
    group = group_of(group)
    call = "all_to_all_into"
    dtype = movable(call, "input", input, group)
    movable(call, "output", output, group)
    writable(call, "output", output, group)
    fits_input(call, output, input, group)
    input_rows = output_rows = None
    if input_splits is None and output_splits is None:
        divided(call, "input", input, group)
        needed = input.shape[0]
    else:
        input_rows = _given_rows(call, "input", input, input_splits, group)
        output_rows = _given_rows(call, "output", output, output_splits, group)
        needed = sum(output_rows)
    if tuple(output.shape) != (needed, *input.shape[1:]) or not output.is_contiguous():
        refuse(
            call,
            group,
            f"output has shape {tuple(output.shape)} and strides {output.stride()}, and the result "
            f"has shape {(needed, *input.shape[1:])}.\n"
            f"  Pass input.new_empty({(needed, *input.shape[1:])}).",
        )
    refuse_any_overlap(call, output, input, group)
    source = dense(input)
    limit_s = seconds(call, timeout_s, group)
    work = _start(source, output, dtype, input_rows, output_rows, group, limit_s, async_op)
    increment_version(output)
    return outcome(work, (source, output), nothing)


Rows = list[int] | None


def _start(
    source: Tensor,
    output: Tensor,
    dtype: DType,
    input_rows: Rows,
    output_rows: Rows,
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> CoreWork | None:
    address, output_address = source.data_ptr(), output.data_ptr()
    if input_rows is None or output_rows is None:
        return group.all_to_all(
            address,
            output_address,
            source.numel() // group.size,
            dtype,
            shape=source.shape,
            place=place_of(output),
            timeout_s=timeout_s,
            async_op=async_op,
        )
    row = math.prod(source.shape[1:])
    return group.all_to_all(
        address,
        output_address,
        source.numel(),
        dtype,
        input_counts=[rows * row for rows in input_rows],
        output_counts=[rows * row for rows in output_rows],
        shape=(_ANY, *source.shape[1:]),
        place=place_of(output),
        timeout_s=timeout_s,
        async_op=async_op,
    )


def _rows(
    call: str,
    t: Tensor,
    input_splits: Sequence[int] | None,
    output_splits: Sequence[int] | None,
    group: Group,
    timeout_s: float,
) -> tuple[Rows, Rows]:
    """Rows to and from each rank, which may have to be asked for; None for equal blocks."""
    if input_splits is None and output_splits is None:
        divided(call, "t", t, group)
        return None, None
    to_ranks = _given_rows(call, "input", t, input_splits, group)
    if output_splits is not None:
        return to_ranks, splits_of(call, "output_splits", output_splits, group)
    sent = torch.tensor(to_ranks)
    received = torch.empty_like(sent)
    group.all_to_all(
        sent.data_ptr(),
        received.data_ptr(),
        1,
        DType.INT64,
        name="all_to_all's splits",
        timeout_s=timeout_s,
    )
    return to_ranks, received.tolist()


def _given_rows(
    call: str, argument: str, t: Tensor, splits: Sequence[int] | None, group: Group
) -> list[int]:
    """Splits that cut ``t``; equal ones for None."""
    if splits is None:
        return [divided(call, argument, t, group)] * group.size
    rows = splits_of(call, f"{argument}_splits", splits, group)
    if t.dim() == 0 or sum(rows) != t.shape[0]:
        refuse(
            call,
            group,
            f"{argument}_splits are {rows}, {sum(rows)} rows together, and the tensor has shape "
            f"{tuple(t.shape)}.\n  Pass splits whose sum is its dimension 0.",
        )
    return rows
