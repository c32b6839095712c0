"""Torch's tensors and lists of tensors, as the core wants them.

A tensor that torch lets a user pass, and the core cannot write where it lies (it has gaps, or is
part of a list), is moved through a contiguous copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from pycomm._core import Group
from pycomm.arguments import refuse
from pycomm.memory import dense, memory_order
from pycomm.work import CoreWork, Together, Work, nothing

T = TypeVar("T")
Started = Work[Any] | None


class Delivery(Work[T]):
    """An operation at whose end results are copied to where they belong.

    Somebody has to do that soon after, whether the caller waits or not.
    """


def delivered(work: CoreWork, keep: object, finish: Callable[[], T]) -> Delivery[T]:
    """``finish`` copies, in any thread: as one that infers only, if this one does."""
    infers = torch.is_inference_mode_enabled()

    def copy() -> T:
        with torch.inference_mode(infers), torch.no_grad():
            return finish()

    return Delivery(work, keep, copy)


def outcome(work: CoreWork | None, keep: object, finish: Callable[[], None]) -> Started:
    if work is None:
        finish()
        return None
    return Work(work, keep, finish) if finish is nothing else delivered(work, keep, finish)


def plain(call: str, t: Tensor, group: Group) -> Tensor:
    """``t`` without autograd. What a functional collective has returned is waited for."""
    if type(t) is Tensor or type(t) is Parameter or not isinstance(t, Tensor):
        return t.detach()
    functional = sys.modules.get("torch.distributed._functional_collectives")
    if functional is not None and isinstance(t, functional.AsyncCollectiveTensor):
        return plain(call, t.trigger_wait(), group)
    if t.layout is torch.strided and t.numel() > 0 and not _has_memory(t):
        refuse(
            call,
            group,
            f"a {type(t).__name__} has no memory of its own that could be sent.\n"
            "  Pass what is inside: to_local() of a DTensor.",
        )
    return t.detach()


def _has_memory(t: Tensor) -> bool:
    try:
        return t.data_ptr() != 0
    except RuntimeError:  # a FakeTensor
        return False


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Those in lists and tuples, however deep."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


def joined(works: Sequence[CoreWork | None]) -> CoreWork | None:
    pending = [work for work in works if work is not None]
    return Together(pending) if pending else None


def together(works: Sequence[Started], async_op: bool) -> Started:
    """Operations of one group, at least one, started one after the other, as one."""
    if not async_op:
        return None
    pending = [work for work in works if work is not None]
    core_works = Together([work.core_work for work in pending])
    if not any(isinstance(work, Delivery) for work in pending):
        return Work(core_works, pending, nothing)

    def finish() -> None:
        for work in pending:
            work.wait()

    return delivered(core_works, pending, finish)


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


def blocks_of(
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
        check_same_kind(call, f"{argument}[{index}]", block, like, group)
    return [plain(call, block, group) for block in blocks]


def outputs_of(call: str, outputs: Sequence[Tensor], like: Tensor, group: Group) -> list[Tensor]:
    """The same, of tensors that will be written."""
    parts = blocks_of(call, "outputs", outputs, like, group)
    for index, part in enumerate(parts):
        check_every_element_has_memory(call, f"outputs[{index}]", part, group)
    return parts


def check_every_element_has_memory(call: str, argument: str, t: Tensor, group: Group) -> None:
    """Refuse to write what ``expand`` returns, whose elements cannot get values of their own."""
    if any(step == 0 and n > 1 for step, n in zip(t.stride(), t.shape, strict=True)) and t.numel():
        refuse(
            call,
            group,
            f"{argument} of shape {tuple(t.shape)} has strides {t.stride()}: several of its "
            f"elements share memory, so it cannot be written.\n  Pass {argument}.clone().",
        )


def check_same_kind(call: str, argument: str, t: Tensor, like: Tensor, group: Group) -> None:
    if not isinstance(t, Tensor):
        refuse(call, group, f"{argument} is a {type(t).__name__}. Pass a torch.Tensor.")
    if t.dtype is not like.dtype or t.device != like.device:
        refuse(
            call,
            group,
            f"{argument} has {t.dtype} on {t.device}, and the other tensor has {like.dtype} on "
            f"{like.device}.\n  Pass tensors of one dtype and device.",
        )


def check_same_count(
    call: str, argument: str, t: Tensor, other_argument: str, other: Tensor, group: Group
) -> None:
    if t.numel() != other.numel():
        refuse(
            call,
            group,
            f"{argument} of shape {tuple(t.shape)} has {t.numel()} elements, and {other_argument} "
            f"of shape {tuple(other.shape)} has {other.numel()}.\n  Pass tensors of one size.",
        )


def end_to_end(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([block.reshape(-1) for block in blocks])


def spread(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """The inverse, into tensors that are there."""
    if not parts:
        return
    pieces = torch.split(flat, [part.numel() for part in parts])
    with torch.no_grad():
        torch._foreach_copy_(
            list(parts), [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        )


class Place:
    """Where the core reads and writes a tensor's values: there, or in a copy if it cannot."""

    def __init__(
        self,
        call: str,
        t: Tensor,
        group: Group,
        *,
        row_major: bool = False,
        is_written: bool = True,
    ) -> None:
        """
        Args:
            row_major: the elements must lie in row-major order, so that ranks may hold them in
                tensors of different shapes.
            is_written: whether this rank writes it; a broadcast's root only reads.

        Raises:
            InvalidArgumentError: elements that would be written share memory.
        """
        if is_written:
            check_every_element_has_memory(call, "tensor", t, group)
        self._is_written = is_written
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

    def settled(self, work: CoreWork | None, keep: object = None) -> Started:
        """The operation, after which the tensor holds what was written, if it was."""
        if not self._is_written:
            return outcome(work, (self.memory, keep), nothing)
        if self.memory is self._tensor:
            increment_version(self._tensor)
            return outcome(work, (self.memory, keep), nothing)
        return outcome(work, (self.memory, keep), self.copy_back)

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
