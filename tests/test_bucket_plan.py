"""plan_buckets: which gradients are reduced together, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycomm import _core
from pycomm._core import DType, plan_buckets
from pycomm.errors import InvalidArgumentError

BYTES = {DType.FLOAT16: 2, DType.BFLOAT16: 2, DType.FLOAT32: 4, DType.FLOAT64: 8}


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[DType], list[int], list[int], int, int]:
    """(dtypes, counts, order of some of them, cap, first cap)"""
    parameters = draw(
        st.lists(st.tuples(st.sampled_from(list(BYTES)), st.integers(0, 100)), max_size=30)
    )
    indices = draw(st.permutations(range(len(parameters))))
    order = indices[: draw(st.integers(0, len(parameters)))]
    caps = st.integers(1, 500)
    return [d for d, _ in parameters], [n for _, n in parameters], order, draw(caps), draw(caps)


@given(plans())
def test_each_parameter_is_in_exactly_one_bucket_of_its_dtype(plan) -> None:
    dtypes, counts, *_ = plan
    buckets = plan_buckets(*plan)
    assert sorted(i for bucket in buckets for i in bucket.parameters) == list(range(len(counts)))
    assert all(dtypes[i] is bucket.dtype for bucket in buckets for i in bucket.parameters)


@given(plans())
def test_gradients_and_flags_tile_the_bucket_in_order_aligned_and_apart(plan) -> None:
    _, counts, *_ = plan
    for bucket in plan_buckets(*plan):
        element_bytes = BYTES[bucket.dtype]
        end = 0
        for index, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            assert offset >= end
            assert (offset - end) * element_bytes < 16
            assert offset * element_bytes % 16 == 0
            end = offset + counts[index]
        assert 0 <= (bucket.flags_offset - end) * element_bytes < 16
        assert bucket.count == bucket.flags_offset + len(bucket.parameters)


@given(plans())
def test_only_a_parameter_alone_exceeds_the_cap(plan) -> None:
    _, counts, _, cap, first_cap = plan
    for bucket in plan_buckets(*plan):
        last = bucket.offsets[-1] + counts[bucket.parameters[-1]]
        if len(bucket.parameters) > 1:
            assert last * BYTES[bucket.dtype] <= max(cap, first_cap)


@given(plans())
def test_buckets_are_in_the_order_in_which_they_fill_and_unseen_parameters_come_last(plan) -> None:
    _, counts, order, *_ = plan
    unseen = sorted(set(range(len(counts))) - set(order))
    position = {index: at for at, index in enumerate([*order, *unseen])}
    buckets = plan_buckets(*plan)
    filled = [max(position[i] for i in bucket.parameters) for bucket in buckets]
    assert filled == sorted(filled)
    for bucket in buckets:
        assert len({i in unseen for i in bucket.parameters}) == 1


def test_a_plan_written_out() -> None:
    f32, f64 = DType.FLOAT32, DType.FLOAT64
    #            0    1    2    3    4    5
    dtypes = [f32, f32, f64, f32, f64, f32]
    counts = [10, 8, 5, 30, 1, 7]
    # Arrival 5 4 3 2 1; nobody saw 0. The first bucket takes 40 bytes, the others 160: 5 (28 bytes)
    # opens the first; 3 does not fit and opens another, which 1 fills to 160 bytes with padding.
    buckets = plan_buckets(dtypes, counts, [5, 4, 3, 2, 1], 160, 40)
    assert [bucket.parameters for bucket in buckets] == [[5], [4, 2], [3, 1], [0]]
    assert [bucket.dtype for bucket in buckets] == [f32, f64, f32, f32]
    assert [bucket.offsets for bucket in buckets] == [[0], [0, 2], [0, 32], [0]]
    assert [bucket.flags_offset for bucket in buckets] == [8, 8, 40, 12]


@pytest.mark.parametrize(
    ("order", "cap", "message"),
    [([0, 0], 64, "parameter 0 of 2 twice"), ([2], 64, "parameter 2 of 2"), ([], 0, "at least 1")],
)
def test_nonsense_is_refused(order: list[int], cap: int, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        plan_buckets([DType.FLOAT32] * 2, [1, 1], order, cap, 64)


def test_dtypes_and_counts_must_agree_in_number() -> None:
    with pytest.raises(InvalidArgumentError, match="2 dtypes and 1 counts"):
        _core.plan_buckets([DType.FLOAT32] * 2, [1], [], 64, 64)
