"""All-reduce between and inside hosts: one answer, whatever the size, the cut or the algorithm."""

import functools
import itertools

import pytest
import torch
from collective_cases import (
    DTYPES_AND_OPS,
    FLOATING,
    LAYOUTS,
    MULTI_PIECE,
    assert_same_bits,
    canonical_fold,
    check_fold,
    counts,
    layout_id,
    reduced,
    tensor_of,
    whole_numbers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from run_ranks import run_ranks

import pycomm
from pycomm import ReduceOp, all_gather, all_reduce, all_reduce_, broadcast
from pycomm._core import Algorithm
from pycomm.arguments import REDUCIBLE
from pycomm.runtime import world_group

laws = settings(max_examples=100)


@laws
@given(
    hosts=st.sampled_from(LAYOUTS),
    count=st.integers(0, 300),
    dtype_and_op=st.sampled_from(DTYPES_AND_OPS),
    algorithm=st.sampled_from([Algorithm.AUTO, Algorithm.DIRECT]),
    seed=st.integers(0, 1000),
)
def test_all_reduce_equals_the_canonical_fold(hosts, count, dtype_and_op, algorithm, seed):
    run_ranks(
        len(hosts),
        lambda group: check_fold(group, count, *dtype_and_op, algorithm, seed),
        hosts=hosts,
    )


@laws
@given(
    hosts=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(FLOATING),
    count=st.integers(0, 5000),
    piece_bytes=st.sampled_from([1024, 1088, 4096, 65536]),
    in_arena=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_piece_size_changes_a_bit(hosts, dtype, count, piece_bytes, in_arena, seed):
    inputs = [tensor_of(rank, (count,), dtype, seed) for rank in range(len(hosts))]

    def body(group):
        mine = inputs[group.rank].clone()
        if in_arena and count:
            memory = group.allocate(count * mine.element_size())
            mine = torch.frombuffer(memory, dtype=dtype).copy_(mine)
        all_reduce_(mine, group=group)
        gathered = all_gather(inputs[group.rank], group=group)
        sent = broadcast(inputs[group.rank], 0, group=group)
        assert_same_bits(mine, canonical_fold(inputs, group.hosts, ReduceOp.SUM))
        assert_same_bits(gathered, torch.stack(inputs))
        assert_same_bits(sent, inputs[0])

    run_ranks(len(hosts), body, hosts=hosts, piece_bytes=piece_bytes)


@laws
@given(
    hosts=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(FLOATING),
    cuts=st.lists(st.integers(0, 500), max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_cut_gives_the_same_bits(hosts, dtype, cuts, seed):
    ends = [0, *sorted(cuts), 500]

    def body(group):
        mine = tensor_of(group.rank, (500,), dtype, seed)
        pieces = [mine[begin:end].clone() for begin, end in itertools.pairwise(ends)]
        for piece in pieces:
            all_reduce_(piece, group=group)
        return all_reduce(mine, group=group), torch.cat(pieces)

    results = run_ranks(len(hosts), body, hosts=hosts)
    for whole, pieces in results:
        assert_same_bits(whole, pieces)
        assert_same_bits(whole, results[0][0], "ranks agree")


@laws
@given(
    hosts=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_sixteen_bit_sums_are_float32_sums_rounded_once(hosts, dtype, seed):
    def body(group):
        mine = tensor_of(group.rank, (100,), dtype, seed)
        return all_reduce(mine, group=group), all_reduce(mine.float(), group=group)

    for narrow, wide in run_ranks(len(hosts), body, hosts=hosts):
        assert_same_bits(narrow, wide.to(dtype))


@laws
@given(
    hosts=st.sampled_from(LAYOUTS),
    count=st.integers(0, 300),
    dtype=st.sampled_from([t for t in REDUCIBLE if t not in (torch.bool, torch.uint8)]),
    seed=st.integers(0, 1000),
)
def test_the_ring_gives_exact_sums_exactly(hosts, count, dtype, seed):
    inputs = [whole_numbers(rank, (count,), dtype, seed) for rank in range(len(hosts))]
    expected = functools.reduce(torch.add, inputs)
    for result in run_ranks(
        len(hosts),
        lambda group: reduced(inputs[group.rank], group, ReduceOp.SUM, Algorithm.RING),
        hosts=hosts,
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 1, 2, 3]], ids=layout_id)
def test_ranks_agree_on_what_the_ring_rounds(hosts):
    results = run_ranks(
        4,
        lambda group: reduced(
            tensor_of(group.rank, (1000,), torch.float32), group, ReduceOp.SUM, Algorithm.RING
        ),
        hosts=hosts,
    )
    for result in results:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("algorithm", [Algorithm.AUTO, Algorithm.DIRECT])
@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
def test_boundary_counts(hosts, algorithm):
    def body(group):
        for count in counts(len(hosts)):
            for dtype in (torch.bfloat16, torch.float32, torch.int64):
                check_fold(group, count, dtype, ReduceOp.SUM, algorithm)

    run_ranks(len(hosts), body, hosts=hosts)


@pytest.mark.parametrize("algorithm", list(Algorithm))
@pytest.mark.parametrize("hosts", [[0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], ids=layout_id)
def test_many_pieces(hosts, algorithm):
    def body(group):
        t = torch.arange(MULTI_PIECE, dtype=torch.int32).remainder_(1 << 20) + group.rank
        result = reduced(t, group, ReduceOp.SUM, algorithm)
        p = group.size
        assert torch.equal(result, (t - group.rank) * p + p * (p - 1) // 2)
        if algorithm is not Algorithm.RING:
            inputs = [torch.linspace(-1, 1, MULTI_PIECE) / (rank + 3) for rank in range(p)]
            result = reduced(inputs[group.rank], group, ReduceOp.AVG, algorithm)
            assert torch.equal(result, canonical_fold(inputs, group.hosts, ReduceOp.AVG))

    run_ranks(len(hosts), body, hosts=hosts)


@pytest.mark.parametrize(("dtype", "op"), DTYPES_AND_OPS, ids=str)
def test_every_dtype_and_op(dtype, op):
    def body(group):
        check_fold(group, 37, dtype, op)
        inputs = [tensor_of(rank, (37,), dtype) for rank in range(group.size)]
        in_place = inputs[group.rank].clone()
        all_reduce_(in_place, op, group=group)
        assert_same_bits(in_place, canonical_fold(inputs, group.hosts, op))

    run_ranks(4, body, hosts=[0, 0, 1, 1])


@pytest.mark.mpi
def test_folds_of_processes():
    pycomm.init()
    group = world_group()
    for count in [*counts(group.size), MULTI_PIECE]:
        for dtype in (torch.bfloat16, torch.float64):
            check_fold(group, count, dtype, ReduceOp.AVG)
