"""Boxes: which part of a whole tensor something is. Pure; knows no ranks and no files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Box:
    """The elements ``offsets[d]`` to ``offsets[d] + sizes[d]`` of each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    def shifted(self, dim: int, by: int) -> Box:
        """As part of a tensor in which this one's begins at row ``by`` of ``dim``."""
        offsets = list(self.offsets)
        offsets[dim] += by
        return Box(tuple(offsets), self.sizes)

    def overlaps(self, other: Box) -> bool:
        """Whether the two have an element in common."""
        return all(
            max(a, b) < min(a + a_size, b + b_size)
            for a, a_size, b, b_size in zip(
                self.offsets, self.sizes, other.offsets, other.sizes, strict=True
            )
        )

    def __str__(self) -> str:
        runs = zip(self.offsets, self.sizes, strict=True)
        return f"[{', '.join(f'{begin}:{begin + size}' for begin, size in runs)}]"


def boxes_of_range(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """Elements ``begin`` to ``end`` of a row-major tensor: at most 2N-1 boxes, in their order.

    Each is one run of the range: for a matrix the end of a row, whole rows, the beginning of a row.
    """
    if begin >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, after_first = divmod(begin, row)
    last, before_last = divmod(end, row)

    def within(number: int, begin: int, end: int) -> list[Box]:
        return [
            Box((number, *box.offsets), (1, *box.sizes))
            for box in boxes_of_range(shape[1:], begin, end)
        ]

    if first == last:
        return within(first, after_first, before_last)
    boxes = []
    if after_first:
        boxes += within(first, after_first, row)
        first += 1
    if first < last:
        boxes.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + within(last, 0, before_last)


def boxes_of_memory(
    run: Tensor, shape: Sequence[int], strides: Sequence[int], begin: int
) -> list[tuple[Box, Tensor]]:
    """What a run of a tensor's memory is of the tensor; each box with its elements, views of it.

    Args:
        run: 1-D, the elements from ``begin`` on, in the order of memory.
        shape, strides: of the tensor, whose elements fill its memory.
    """
    order = sorted(range(len(shape)), key=lambda dim: strides[dim], reverse=True)
    place = [order.index(dim) for dim in range(len(shape))]
    found, at = [], 0
    for box in boxes_of_range([shape[dim] for dim in order], begin, begin + run.numel()):
        elements = run[at : at + box.count].view(box.sizes).permute(place)
        at += box.count
        offsets = tuple(box.offsets[index] for index in place)
        found.append((Box(offsets, tuple(elements.shape)), elements))
    return found


def gap_or_overlap(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What keeps the boxes from making up a tensor of ``shape``, if anything does."""
    for box in boxes:
        if any(
            begin < 0 or begin + size > length
            for begin, size, length in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            return f"{box} lies outside"
    ordered = sorted(boxes, key=lambda box: box.offsets)
    active: list[Box] = []  # those that reach as far as the next one along the first dimension
    for box in ordered:
        if shape:
            active = [one for one in active if one.offsets[0] + one.sizes[0] > box.offsets[0]]
        for other in active:
            if other.overlaps(box):
                return f"{other} and {box} overlap"
        active.append(box)
    count, whole = sum(box.count for box in boxes), math.prod(shape)
    if count != whole:
        return f"{', '.join(map(str, ordered)) or 'nothing'} has {count} of its {whole} elements"
    return None
