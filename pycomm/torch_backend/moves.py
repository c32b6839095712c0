"""What torch's collectives that only move data ask for, in terms of the core's.

Arguments and results are as in ``reductions``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pycomm._core import Group
from pycomm.arguments import movable, rank_of, refuse
from pycomm.device import place_of
from pycomm.memory import dense
from pycomm.torch_backend.tensors import (
    Place,
    Started,
    blocks_of,
    check_same_count,
    check_same_kind,
    end_to_end,
    only,
    only_first,
    outcome,
    outputs_of,
    plain,
    spread,
)
from pycomm.work import nothing


def broadcast(
    tensors: Sequence[Tensor], root: int, group: Group, timeout_s: float, async_op: bool
) -> Started:
    t = plain("broadcast", only("broadcast", "tensors", tensors, group), group)
    dtype = movable("broadcast", "tensor", t, group)
    root = rank_of("broadcast", "root", root, group)
    place = Place("broadcast", t, group, is_written=group.rank != root)
    work = group.broadcast(
        place.address,
        place.address,
        t.numel(),
        dtype,
        root,
        shape=t.shape,
        name=place.memory_order,
        place=place_of(t),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.settled(work)


def all_gather(
    outputs: Sequence[Sequence[Tensor]],
    inputs: Sequence[Tensor],
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """Every rank's input into ``outputs[0]``, by rank; their sizes may differ."""
    call = "all_gather"
    source = plain(call, only(call, "inputs", inputs, group), group)
    parts = outputs_of(call, only(call, "outputs", outputs, group), source, group)
    dtype = movable(call, "input", source, group)
    source = dense(source)
    counts = [part.numel() for part in parts]
    flat = source.new_empty(sum(counts))
    check_same_count(call, "input", source, f"outputs[{group.rank}]", parts[group.rank], group)
    even = all(count == counts[0] for count in counts)
    work = group.all_gather(
        source.data_ptr(),
        flat.data_ptr(),
        source.numel(),
        dtype,
        output_counts=() if even else counts,
        name="" if even else f"all_gather of {counts} elements",
        place=place_of(flat),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return outcome(work, (source, flat), lambda: spread(flat, parts))


def all_gather_single(
    output: Tensor, input: Tensor, group: Group, timeout_s: float, async_op: bool
) -> Started:
    """Every rank's input, end to end, into one tensor of as many elements."""
    call = "all_gather_single"
    output, source = plain(call, output, group), plain(call, input, group)
    dtype = movable(call, "input", source, group)
    check_same_kind(call, "output", output, source, group)
    if output.numel() != group.size * source.numel():
        refuse(
            call,
            group,
            f"output of shape {tuple(output.shape)} has {output.numel()} elements, and "
            f"{group.size} inputs of shape {tuple(source.shape)} have "
            f"{group.size * source.numel()}.\n  Pass an output of that many elements.",
        )
    place = Place(call, output, group, row_major=True)
    source = dense(source)
    work = group.all_gather(
        source.data_ptr(),
        place.address,
        source.numel(),
        dtype,
        place=place_of(output),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.settled(work, source)


def gather(
    outputs: Sequence[Sequence[Tensor]],
    inputs: Sequence[Tensor],
    root: int,
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """Every rank's input into the root's ``outputs[0]``, by rank; there are none elsewhere."""
    call = "gather"
    source = plain(call, only(call, "inputs", inputs, group), group)
    root = rank_of(call, "root", root, group)
    dtype = movable(call, "input", source, group)
    parts: list[Tensor] = []
    if group.rank == root:
        parts = outputs_of(call, only(call, "outputs", outputs, group), source, group)
        for index, part in enumerate(parts):
            check_same_count(call, "input", source, f"outputs[{index}]", part, group)
    elif len(outputs) > 0 and len(outputs[0]) > 0:
        refuse(call, group, f"outputs are given, and the root is rank {root}. Pass none here.")
    source = dense(source)
    flat = source.new_empty(group.size * source.numel() if parts else 0)
    work = group.gather(
        source.data_ptr(),
        flat.data_ptr() if parts else 0,
        source.numel(),
        dtype,
        root,
        place=place_of(source),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return outcome(work, (source, flat), lambda: spread(flat, parts))


def scatter(
    outputs: Sequence[Tensor],
    inputs: Sequence[Sequence[Tensor]],
    root: int,
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """``inputs[0][r]`` of the root into rank ``r``'s output; ``inputs`` is empty elsewhere."""
    call = "scatter"
    output = plain(call, only(call, "outputs", outputs, group), group)
    root = rank_of(call, "root", root, group)
    dtype = movable(call, "output", output, group)
    flat = output.new_empty(0)
    if group.rank == root:
        blocks = blocks_of(call, "inputs", only(call, "inputs", inputs, group), output, group)
        for index, block in enumerate(blocks):
            check_same_count(call, "output", output, f"inputs[{index}]", block, group)
        flat = end_to_end(blocks)
    elif len(inputs) > 0 and len(inputs[0]) > 0:
        refuse(call, group, f"inputs are given, and the root is rank {root}. Pass none here.")
    place = Place(call, output, group, row_major=True)
    work = group.scatter(
        flat.data_ptr() if group.rank == root else 0,
        place.address,
        output.numel(),
        dtype,
        root,
        place=place_of(output),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.settled(work, flat)


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """Block ``r`` of the input goes to rank ``r``; splits are rows, or empty for equal blocks.

    Ranks compare what each pair of them says, however it is said: one rank may give splits, and
    another leave them out because its blocks happen to be equal.
    """
    call = "all_to_all_single"
    output, source = plain(call, output, group), plain(call, input, group)
    dtype = movable(call, "input", source, group)
    check_same_kind(call, "output", output, source, group)
    if not input_splits and not output_splits:
        check_same_count(call, "output", output, "input", source, group)
    input_counts = _split_counts(call, "input", source, input_splits, group)
    output_counts = _split_counts(call, "output", output, output_splits, group)
    place = Place(call, output, group, row_major=True)
    source = dense(source)
    work = group.all_to_all(
        source.data_ptr(),
        place.address,
        source.numel(),
        dtype,
        input_counts=input_counts,
        output_counts=output_counts,
        place=place_of(output),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.settled(work, source)


def all_to_all(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """``inputs[r]`` goes to rank ``r``, whose ``outputs[mine]`` it fills; sizes may differ."""
    call = "all_to_all"
    like = only_first(call, "inputs", inputs, group)
    sources = blocks_of(call, "inputs", inputs, like, group)
    parts = outputs_of(call, outputs, like, group)
    dtype = movable(call, "inputs[0]", like, group)
    source = end_to_end(sources)
    output_counts = [part.numel() for part in parts]
    flat = source.new_empty(sum(output_counts))
    work = group.all_to_all(
        source.data_ptr(),
        flat.data_ptr(),
        source.numel(),
        dtype,
        input_counts=[block.numel() for block in sources],
        output_counts=output_counts,
        place=place_of(flat),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return outcome(work, (source, flat), lambda: spread(flat, parts))


def barrier(group: Group, timeout_s: float, async_op: bool) -> Started:
    return outcome(group.barrier(timeout_s=timeout_s, async_op=async_op), None, nothing)


def _split_counts(
    call: str, argument: str, t: Tensor, splits: Sequence[int], group: Group
) -> list[int]:
    """Elements to or from each rank."""
    rows = t.shape[0] if t.dim() else 0
    if not splits:
        splits = [rows // group.size] * group.size
        if t.dim() == 0 or rows % group.size:
            refuse(
                call,
                group,
                f"{argument} has shape {tuple(t.shape)}, whose dimension 0 cannot be cut into "
                f"{group.size} equal blocks.\n  Pass {argument}_split_sizes.",
            )
    if len(splits) != group.size or min(splits) < 0 or sum(splits) != rows:
        refuse(
            call,
            group,
            f"{argument}_split_sizes are {list(splits)}, and {argument} has shape "
            f"{tuple(t.shape)}.\n  Pass {group.size} numbers of rows whose sum is its dimension 0.",
        )
    row = t.shape[1:].numel()
    return [n * row for n in splits]
