"""What torch's reductions ask for, in terms of the core's.

Each function starts one of them on a core group and returns its ``Work``, or None when it has run
to its end. Arguments are torch's: lists of tensors where torch gives lists, a rank of the group as
root; ``scale`` is the factor of PREMUL_SUM; ``timeout_s`` 0 is the group's default. Autograd
follows none of this, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm._core import DType, Group, ReduceOp
from pycomm.arguments import rank_of, reducible, refuse
from pycomm.device import place_of
from pycomm.memory import dense
from pycomm.torch_backend.backward import Backward
from pycomm.torch_backend.tensors import (
    Place,
    Started,
    blocks_of,
    check_same_count,
    check_same_kind,
    end_to_end,
    joined,
    only,
    outcome,
    plain,
)


def all_reduce(
    tensors: Sequence[Tensor],
    op: ReduceOp,
    scale: float,
    group: Group,
    timeout_s: float,
    async_op: bool,
    backward: Backward | None = None,
    meaning: str = "",
) -> Started:
    """In ``backward``, if that is not over, where the training thread comes by again.

    A tensor that goes there is dense and on the CPU.
    """
    t = only("all_reduce", "tensors", tensors, group)
    if t.layout is torch.sparse_coo:
        return sparse_all_reduce(t, op, group, timeout_s, async_op)
    t = plain("all_reduce", t, group)
    if _averages_integers(op, t):
        total = all_reduce([t], ReduceOp.SUM, scale, group, timeout_s, async_op, meaning=_AVERAGE)
        return _divided(total, t, group)
    dtype = reducible("all_reduce", "tensor", t, op, group)
    place = Place("all_reduce", t, group)
    if backward is not None:
        reduction = backward.all_reduce(
            place.address,
            place.address,
            t.numel(),
            dtype,
            op,
            prescale=scale,
            shape=t.shape,
            name=place.memory_order,
            timeout_s=timeout_s,
        )
        if reduction is not None:
            return place.settled(reduction)
    work = group.all_reduce(
        place.address,
        place.address,
        t.numel(),
        dtype,
        op,
        prescale=scale,
        shape=t.shape,
        name=meaning + place.memory_order,
        place=place_of(t),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.settled(work)


def sparse_all_reduce(
    t: Tensor, op: ReduceOp, group: Group, timeout_s: float, async_op: bool
) -> Started:
    """The sum of sparse (coordinate) tensors: every rank gathers all entries and adds them up.

    The ranks tell each other how many there are first, for which an asynchronous call waits too.
    Indices of one element are added in rank order, so all ranks get the same bits.
    """
    call = "all_reduce of a sparse tensor"
    if op is not ReduceOp.SUM:
        refuse(call, group, f"op is {op.name}, and sparse tensors are only summed. Pass SUM.")
    entries = t.detach().coalesce()
    indices = entries.indices().t().contiguous()  # an entry a row: ranks' rows lie end to end
    values = entries.values().contiguous()
    dtype = reducible(call, "tensor", values, op, group)
    mine = torch.tensor([len(indices)])
    counts = torch.empty(group.size, dtype=torch.int64)
    group.all_gather(
        mine.data_ptr(),
        counts.data_ptr(),
        1,
        DType.INT64,
        name=f"entries of {tuple(t.shape)} {t.dtype}",
        timeout_s=timeout_s,
    )
    rows = counts.tolist()
    all_indices = indices.new_empty((sum(rows), t.sparse_dim()))
    all_values = values.new_empty((sum(rows), *values.shape[1:]))
    works = []
    for source, output, element, width in (
        (indices, all_indices, DType.INT64, t.sparse_dim()),
        (values, all_values, dtype, values.shape[1:].numel()),
    ):
        work = group.all_gather(
            source.data_ptr(),
            output.data_ptr(),
            source.numel(),
            element,
            output_counts=[n * width for n in rows],
            name=call,
            place=place_of(output),
            timeout_s=timeout_s,
            async_op=async_op,
        )
        works.append(work)

    def finish() -> None:
        total = torch.sparse_coo_tensor(all_indices.t(), all_values, t.shape)
        with torch.no_grad():
            t.copy_(total.coalesce())  # not into t.detach(): it has entries of its own

    return outcome(joined(works), (indices, values, all_indices, all_values), finish)


def reduce(
    tensors: Sequence[Tensor],
    root: int,
    op: ReduceOp,
    scale: float,
    group: Group,
    timeout_s: float,
    async_op: bool,
    meaning: str = "",
) -> Started:
    """Only the root's tensor is written."""
    t = plain("reduce", only("reduce", "tensors", tensors, group), group)
    if _averages_integers(op, t):
        total = reduce([t], root, ReduceOp.SUM, scale, group, timeout_s, async_op, _AVERAGE)
        return _divided(total, t, group) if group.rank == root else total
    dtype = reducible("reduce", "tensor", t, op, group)
    root = rank_of("reduce", "root", root, group)
    place = Place("reduce", t, group, is_written=group.rank == root)
    work = group.reduce(
        place.address,
        place.address if group.rank == root else 0,
        t.numel(),
        dtype,
        op,
        root,
        prescale=scale,
        shape=t.shape,
        name=meaning + place.memory_order,
        place=place_of(t),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.settled(work)


def reduce_scatter(
    outputs: Sequence[Tensor],
    inputs: Sequence[Sequence[Tensor]],
    op: ReduceOp,
    scale: float,
    group: Group,
    timeout_s: float,
    async_op: bool,
    meaning: str = "",
) -> Started:
    """The sum of all ranks' ``inputs[0][r]`` into rank ``r``'s output; their sizes may differ."""
    call = "reduce_scatter"
    output = plain(call, only(call, "outputs", outputs, group), group)
    if _averages_integers(op, output):
        total = reduce_scatter(
            [output], inputs, ReduceOp.SUM, scale, group, timeout_s, async_op, _AVERAGE
        )
        return _divided(total, output, group)
    blocks = blocks_of(call, "inputs", only(call, "inputs", inputs, group), output, group)
    check_same_count(call, "output", output, f"inputs[{group.rank}]", blocks[group.rank], group)
    if all(block.numel() == output.numel() for block in blocks):
        source = end_to_end(blocks)
        return reduce_scatter_single(output, source, op, scale, group, timeout_s, async_op, meaning)
    # A reduction to each rank: the core's reduce_scatter has blocks of one size.
    dtype = reducible(call, "output", output, op, group)
    place = Place(call, output, group, row_major=True)
    works = []
    for root, block in enumerate(map(dense, blocks)):
        work = group.reduce(
            block.data_ptr(),
            place.address if group.rank == root else 0,
            block.numel(),
            dtype,
            op,
            root,
            prescale=scale,
            name=f"block {root} of reduce_scatter{meaning}",
            place=place_of(block),
            timeout_s=timeout_s,
            async_op=async_op,
        )
        works.append(work)
    return place.settled(joined(works), blocks)


def reduce_scatter_single(
    output: Tensor,
    input: Tensor,
    op: ReduceOp,
    scale: float,
    group: Group,
    timeout_s: float,
    async_op: bool,
    meaning: str = "",
) -> Started:
    """Block ``r`` of the sum of all ranks' inputs into rank ``r``'s output."""
    call = "reduce_scatter_single"
    output, source = plain(call, output, group), plain(call, input, group)
    if _averages_integers(op, source):
        total = reduce_scatter_single(
            output, source, ReduceOp.SUM, scale, group, timeout_s, async_op, _AVERAGE
        )
        return _divided(total, output, group)
    dtype = reducible(call, "input", source, op, group)
    check_same_kind(call, "output", output, source, group)
    if source.numel() != group.size * output.numel():
        refuse(
            call,
            group,
            f"input of shape {tuple(source.shape)} has {source.numel()} elements, and "
            f"{group.size} outputs of shape {tuple(output.shape)} have "
            f"{group.size * output.numel()}.\n  Pass an input of that many elements.",
        )
    place = Place(call, output, group, row_major=True)
    source = dense(source)
    work = group.reduce_scatter(
        source.data_ptr(),
        place.address,
        output.numel(),
        dtype,
        op,
        prescale=scale,
        name=meaning,
        place=place_of(output),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.settled(work, source)


# Tells such a sum from one that is meant to be a sum, so that ranks that differ are told.
_AVERAGE = "(average of integers)"


def _averages_integers(op: ReduceOp, t: Tensor) -> bool:
    """What the core leaves to its caller, and torch's users of NCCL rely on."""
    if op is not ReduceOp.AVG or t.dtype is torch.bool:
        return False
    return not (t.is_floating_point() or t.is_complex())


def _divided(total: Started, t: Tensor, group: Group) -> Started:
    """The average of integers, once their sum is there: as NCCL rounds it, towards zero."""

    def divide() -> None:
        if total is not None:
            total.wait()
        with torch.no_grad():
            t.div_(group.size, rounding_mode="trunc")

    return outcome(None if total is None else total.core_work, total, divide)
