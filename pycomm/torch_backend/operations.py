"""What torch's collectives ask for, in terms of the core's.

Each function starts one operation of ``torch.distributed`` on a core group and returns its
``Work``, or None when it has run to its end. Arguments are torch's: lists of tensors where torch
gives lists, a rank of the group as root. ``timeout_s`` 0 is the group's default.

A tensor that torch lets a user pass, and the core cannot write where it lies (it has gaps, or is
part of a list), is moved through a contiguous copy. Autograd follows none of this, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm._core import DType, Group, ReduceOp
from pycomm.arguments import movable, rank_of, reducible, refuse
from pycomm.device import place_of
from pycomm.memory import dense, memory_order
from pycomm.torch_backend.backward import Backward
from pycomm.work import CoreWork, Together, Work, nothing

Started = Work[Any] | None


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
    """In ``backward``, if that is not over, where the training thread comes by again."""
    t = only("all_reduce", "tensors", tensors, group)
    if t.layout is torch.sparse_coo:
        return sparse_all_reduce(t, op, group, timeout_s, async_op)
    t = t.detach()
    if _averages_integers(op, t):
        total = all_reduce([t], ReduceOp.SUM, scale, group, timeout_s, async_op, meaning=_AVERAGE)
        return _divided(total, t, group)
    dtype = reducible("all_reduce", "tensor", t, op, group)
    place = _Place("all_reduce", t, group)
    if backward is not None and t.is_cpu:
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
            return place.written(reduction)
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
    return place.written(work)


def all_reduce_coalesced(
    tensors: Sequence[Tensor],
    op: ReduceOp,
    scale: float,
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """Several tensors, an operation each, as one."""
    return together(
        [all_reduce([t], op, scale, group, timeout_s, async_op) for t in tensors], group, async_op
    )


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

    return _outcome(_joined(works), (indices, values, all_indices, all_values), finish)


def broadcast(
    tensors: Sequence[Tensor], root: int, group: Group, timeout_s: float, async_op: bool
) -> Started:
    t = only("broadcast", "tensors", tensors, group).detach()
    dtype = movable("broadcast", "tensor", t, group)
    place = _Place("broadcast", t, group)
    work = group.broadcast(
        place.address,
        place.address,
        t.numel(),
        dtype,
        rank_of("broadcast", "root", root, group),
        shape=t.shape,
        name=place.memory_order,
        place=place_of(t),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.written(work)


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
    t = only("reduce", "tensors", tensors, group).detach()
    if _averages_integers(op, t):
        total = reduce([t], root, ReduceOp.SUM, scale, group, timeout_s, async_op, _AVERAGE)
        return _divided(total, t, group) if group.rank == root else total
    dtype = reducible("reduce", "tensor", t, op, group)
    root = rank_of("reduce", "root", root, group)
    place = _Place("reduce", t, group)
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
    return place.written(work) if group.rank == root else _outcome(work, place.memory, nothing)


def all_gather(
    outputs: Sequence[Sequence[Tensor]],
    inputs: Sequence[Tensor],
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """Every rank's input into ``outputs[0]``, by rank; their sizes may differ."""
    call = "all_gather"
    source = only(call, "inputs", inputs, group).detach()
    parts = _blocks(call, "outputs", only(call, "outputs", outputs, group), source, group)
    dtype = movable(call, "input", source, group)
    source = dense(source)
    counts = [part.numel() for part in parts]
    flat = source.new_empty(sum(counts))
    _same_count(call, "input", source, f"outputs[{group.rank}]", parts[group.rank], group)
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
    return _outcome(work, (source, flat), lambda: _spread(flat, parts))


def all_gather_single(
    output: Tensor, input: Tensor, group: Group, timeout_s: float, async_op: bool
) -> Started:
    """Every rank's input, end to end, into one tensor of as many elements."""
    call = "all_gather_single"
    output, source = output.detach(), input.detach()
    dtype = movable(call, "input", source, group)
    _same_kind(call, "output", output, source, group)
    if output.numel() != group.size * source.numel():
        refuse(
            call,
            group,
            f"output of shape {tuple(output.shape)} has {output.numel()} elements, and "
            f"{group.size} inputs of shape {tuple(source.shape)} have "
            f"{group.size * source.numel()}.\n  Pass an output of that many elements.",
        )
    place = _Place(call, output, group, row_major=True)
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
    return place.written(work, source)


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
    source = only(call, "inputs", inputs, group).detach()
    root = rank_of(call, "root", root, group)
    dtype = movable(call, "input", source, group)
    parts: list[Tensor] = []
    if group.rank == root:
        parts = _blocks(call, "outputs", only(call, "outputs", outputs, group), source, group)
        for index, part in enumerate(parts):
            _same_count(call, "input", source, f"outputs[{index}]", part, group)
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
    return _outcome(work, (source, flat), lambda: _spread(flat, parts))


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
    output = only(call, "outputs", outputs, group).detach()
    root = rank_of(call, "root", root, group)
    dtype = movable(call, "output", output, group)
    flat = output.new_empty(0)
    if group.rank == root:
        blocks = _blocks(call, "inputs", only(call, "inputs", inputs, group), output, group)
        for index, block in enumerate(blocks):
            _same_count(call, "output", output, f"inputs[{index}]", block, group)
        flat = _end_to_end(blocks)
    elif len(inputs) > 0 and len(inputs[0]) > 0:
        refuse(call, group, f"inputs are given, and the root is rank {root}. Pass none here.")
    place = _Place(call, output, group, row_major=True)
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
    return place.written(work, flat)


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
    output = only(call, "outputs", outputs, group).detach()
    if _averages_integers(op, output):
        total = reduce_scatter(
            [output], inputs, ReduceOp.SUM, scale, group, timeout_s, async_op, _AVERAGE
        )
        return _divided(total, output, group)
    blocks = _blocks(call, "inputs", only(call, "inputs", inputs, group), output, group)
    _same_count(call, "output", output, f"inputs[{group.rank}]", blocks[group.rank], group)
    if all(block.numel() == output.numel() for block in blocks):
        source = _end_to_end(blocks)
        return reduce_scatter_single(output, source, op, scale, group, timeout_s, async_op, meaning)
    # A reduction to each rank: the core's reduce_scatter has blocks of one size.
    dtype = reducible(call, "output", output, op, group)
    place = _Place(call, output, group, row_major=True)
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
    return place.written(_joined(works), blocks)


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
    output, source = output.detach(), input.detach()
    if _averages_integers(op, source):
        total = reduce_scatter_single(
            output, source, ReduceOp.SUM, scale, group, timeout_s, async_op, _AVERAGE
        )
        return _divided(total, output, group)
    dtype = reducible(call, "input", source, op, group)
    _same_kind(call, "output", output, source, group)
    if source.numel() != group.size * output.numel():
        refuse(
            call,
            group,
            f"input of shape {tuple(source.shape)} has {source.numel()} elements, and "
            f"{group.size} outputs of shape {tuple(output.shape)} have "
            f"{group.size * output.numel()}.\n  Pass an input of that many elements.",
        )
    place = _Place(call, output, group, row_major=True)
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
    return place.written(work, source)


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Started:
    """Block ``r`` of the input goes to rank ``r``; splits are rows, or empty for equal blocks."""
    call = "all_to_all_single"
    output, source = output.detach(), input.detach()
    dtype = movable(call, "input", source, group)
    _same_kind(call, "output", output, source, group)
    input_counts = _split_counts(call, "input", source, input_splits, group)
    output_counts = _split_counts(call, "output", output, output_splits, group)
    place = _Place(call, output, group, row_major=True)
    source = dense(source)
    even = not input_splits and not output_splits
    if even:
        _same_count(call, "output", output, "input", source, group)
    work = group.all_to_all(
        source.data_ptr(),
        place.address,
        source.numel() // group.size if even else source.numel(),
        dtype,
        input_counts=() if even else input_counts,
        output_counts=() if even else output_counts,
        place=place_of(output),
        timeout_s=timeout_s,
        async_op=async_op,
    )
    return place.written(work, source)


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
    sources = _blocks(call, "inputs", inputs, like, group)
    parts = _blocks(call, "outputs", outputs, like, group)
    dtype = movable(call, "inputs[0]", like, group)
    source = _end_to_end(sources)
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
    return _outcome(work, (source, flat), lambda: _spread(flat, parts))


def barrier(group: Group, timeout_s: float, async_op: bool) -> Started:
    return _outcome(group.barrier(timeout_s=timeout_s, async_op=async_op), None, nothing)


class _DrivenByWaiter:
    """A message whose waiter moves it himself where he can."""

    def __init__(self, work: Any, group: Group) -> None:
        self._work = work
        self._group = group
        self.done = work.done
        self.settled = work.settled
        self.announce_to = work.announce_to
        self.order_before = work.order_before

    def wait(self) -> None:
        self._group.wait(self._work)

    @property
    def seconds(self) -> float:
        seconds: float = self._work.seconds
        return seconds


def send(
    tensors: Sequence[Tensor], dst: int, tag: int, group: Group, timeout_s: float
) -> Work[None]:
    """Torch compares the number of elements of a message, not its shape."""
    t = only("send", "tensors", tensors, group).detach()
    dtype = movable("send", "tensor", t, group)
    source = dense(t)
    work = group.isend(
        source.data_ptr(),
        t.numel(),
        dtype,
        rank_of("send", "dst", dst, group),
        _tag("send", tag, group),
        place=place_of(source),
        timeout_s=timeout_s,
    )
    return Work(_DrivenByWaiter(work, group), source, nothing)


def recv(
    tensors: Sequence[Tensor], src: int | None, tag: int, group: Group, timeout_s: float
) -> Work[int]:
    """Its result is whose message it was; ``src`` None takes the earliest of any rank."""
    t = only("recv", "tensors", tensors, group).detach()
    dtype = movable("recv", "tensor", t, group)
    place = _Place("recv", t, group, row_major=True)
    work = group.irecv(
        place.address,
        t.numel(),
        dtype,
        None if src is None else rank_of("recv", "src", src, group),
        _tag("recv", tag, group),
        place=place_of(t),
        timeout_s=timeout_s,
    )

    def finish() -> int:
        place.copy_back()
        return work.source

    return Work(_DrivenByWaiter(work, group), place.memory, finish)


def together(works: Iterable[Started], group: Group, async_op: bool) -> Started:
    """Operations of one group, started one after the other, as one."""
    started = list(works)
    if not started:  # ranks whose lists are not empty learn that this one's is
        return barrier(group, 0.0, async_op)
    if not async_op:
        return None
    pending = [work for work in started if work is not None]

    def finish() -> None:
        for work in pending:
            work.wait()

    return Work(Together([work.core_work for work in pending]), pending, finish)


def only(call: str, argument: str, items: Sequence[Any], group: Group) -> Any:
    """The one item of a list: torch's lists are as long as a process has GPUs to serve."""
    if len(items) != 1:
        refuse(
            call,
            group,
            f"{argument} has {len(items)} entries. Pass one: a process is one rank.",
        )
    return items[0]


def only_first(call: str, argument: str, items: Sequence[Tensor], group: Group) -> Tensor:
    if len(items) == 0:
        refuse(call, group, f"{argument} is empty. Pass a tensor for each of {group.size} ranks.")
    return items[0]


class _Place:
    """Where the core writes a tensor's values: there, or in a copy if it cannot."""

    def __init__(self, call: str, t: Tensor, group: Group, *, row_major: bool = False) -> None:
        """
        Args:
            row_major: the elements must lie in row-major order, so that ranks may hold them in
                tensors of different shapes.
        """
        self._tensor = t
        self.memory_order = ""
        self.memory = t
        if t.is_neg() or t.is_conj() or (row_major and not t.is_contiguous()):
            self.memory = dense(t)
        elif not t.is_contiguous():
            if _fills_its_memory(t):
                self.memory_order = memory_order(call, "tensor", t, group)
            else:
                self.memory = t.contiguous()
        self.address = self.memory.data_ptr()

    def written(self, work: CoreWork | None, keep: object = None) -> Started:
        """The operation, after which the tensor holds what was written."""
        if self.memory is self._tensor:
            increment_version(self._tensor)
            return _outcome(work, (self.memory, keep), nothing)
        return _outcome(work, (self.memory, keep), self.copy_back)

    def copy_back(self) -> None:
        if self.memory is not self._tensor:
            with torch.no_grad():
                self._tensor.copy_(self.memory.view(self._tensor.shape))


def _fills_its_memory(t: Tensor) -> bool:
    """Whether its elements lie in one piece of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _outcome(work: CoreWork | None, keep: object, finish: Callable[[], None]) -> Started:
    if work is None:
        finish()
        return None
    return Work(work, keep, finish)


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

    return _outcome(None if total is None else total.core_work, total, divide)


def _joined(works: Sequence[CoreWork | None]) -> CoreWork | None:
    pending = [work for work in works if work is not None]
    return Together(pending) if pending else None


def _blocks(
    call: str, argument: str, blocks: Sequence[Tensor], like: Tensor, group: Group
) -> list[Tensor]:
    """A tensor for each rank, of the dtype and on the device of ``like``."""
    if len(blocks) != group.size:
        refuse(
            call,
            group,
            f"{argument} has {len(blocks)} tensors, and the group has {group.size} ranks.\n"
            "  Pass one for each rank.",
        )
    for index, block in enumerate(blocks):
        _same_kind(call, f"{argument}[{index}]", block, like, group)
    return [block.detach() for block in blocks]


def _same_kind(call: str, argument: str, t: Tensor, like: Tensor, group: Group) -> None:
    if not isinstance(t, Tensor):
        refuse(call, group, f"{argument} is a {type(t).__name__}. Pass a torch.Tensor.")
    if t.dtype is not like.dtype or t.device != like.device:
        refuse(
            call,
            group,
            f"{argument} has {t.dtype} on {t.device}, and the other tensor has {like.dtype} on "
            f"{like.device}.\n  Pass tensors of one dtype and device.",
        )


def _same_count(
    call: str, argument: str, t: Tensor, other_argument: str, other: Tensor, group: Group
) -> None:
    if t.numel() != other.numel():
        refuse(
            call,
            group,
            f"{argument} of shape {tuple(t.shape)} has {t.numel()} elements, and {other_argument} "
            f"of shape {tuple(other.shape)} has {other.numel()}.\n  Pass tensors of one size.",
        )


def _end_to_end(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([block.reshape(-1) for block in blocks])


def _spread(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """The inverse, into tensors that are there."""
    if not parts:
        return
    pieces = torch.split(flat, [part.numel() for part in parts])
    with torch.no_grad():
        torch._foreach_copy_(
            list(parts), [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        )


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


def _tag(call: str, tag: int, group: Group) -> int:
    if not 0 <= tag < 1 << 31:
        refuse(call, group, f"tag is {tag}. Pass a whole number from 0 to 2147483647.")
    return tag
