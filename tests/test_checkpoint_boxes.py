"""Ranges of a tensor's memory as boxes; parts that make up a whole, or do not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pycomm.checkpoint.boxes import Box, boxes_of_memory, boxes_of_range, gap_or_overlap

shapes = st.lists(st.integers(1, 4), max_size=4)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[list[int], int, int]:
    shape = draw(shapes)
    count = math.prod(shape)
    begin, end = sorted(draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    return shape, begin, end


@given(case=ranges())
def test_boxes_are_the_range_in_order_and_few(case: tuple[list[int], int, int]) -> None:
    shape, begin, end = case
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    boxes = boxes_of_range(shape, begin, end)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.count > 0 for box in boxes)
    found = [number for box in boxes for number in cut(numbers, box).flatten().tolist()]
    assert found == list(range(begin, end))


@given(case=ranges(), data=st.data())
def test_boxes_of_any_memory_order_hold_the_elements_that_lie_there(
    case: tuple[list[int], int, int], data: st.DataObject
) -> None:
    shape, begin, end = case
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.rand(shape).permute(order)
    memory = tensor.as_strided((tensor.numel(),), (1,))
    run = memory[begin:end].clone()
    found = boxes_of_memory(run, tensor.shape, tensor.stride(), begin)
    for box, elements in found:
        assert torch.equal(elements, cut(tensor, box))
        elements.zero_()
    assert not run.any()  # they are views of it, and all of it
    assert sum(box.count for box, _ in found) == end - begin


@given(shape=shapes, data=st.data())
def test_runs_of_several_ranks_make_up_the_whole(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    boxes = [
        box
        for begin, end in itertools.pairwise([0, *cuts, count])
        for box in boxes_of_range(shape, begin, end)
    ]
    assert gap_or_overlap(shape, boxes) is None
    if boxes and math.prod(shape) > 0:
        assert gap_or_overlap(shape, boxes[1:]) is not None
        assert gap_or_overlap(shape, [*boxes, boxes[0]]) is not None


def test_a_matrix_is_an_end_rows_and_a_beginning() -> None:
    assert list(map(str, boxes_of_range([5, 4], 3, 17))) == [
        "[0:1, 3:4]",
        "[1:4, 0:4]",
        "[4:5, 0:1]",
    ]


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (2, 3)), Box((2, 0), (2, 3))], None),
        ([Box((0, 0), (2, 3))], "[0:2, 0:3] has 6 of its 12 elements"),
        ([Box((0, 0), (3, 3)), Box((2, 0), (2, 3))], "[0:3, 0:3] and [2:4, 0:3] overlap"),
        ([Box((0, 0), (4, 4))], "[0:4, 0:4] lies outside"),
        ([], "nothing has 0 of its 12 elements"),
    ],
)
def test_what_is_wrong_is_said(boxes: list[Box], problem: str | None) -> None:
    assert gap_or_overlap((4, 3), boxes) == problem


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (begin, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, begin, size)
    return tensor
