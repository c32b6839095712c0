"""Collectives on tensors: laws, layouts, and what bad calls raise."""

import functools
import gc
import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_ranks import RankError, run_ranks
from torch import Tensor

import pycomm
from pycomm import CommError, CommTimeoutError, InvalidArgumentError, MismatchError, ReduceOp
from pycomm._core import Algorithm, Group
from pycomm.arguments import MOVABLE, REDUCIBLE
from pycomm.collectives import (
    all_gather,
    all_gather_into,
    all_reduce,
    all_reduce_,
    barrier,
    broadcast,
    broadcast_,
)
from pycomm.runtime import world_group

# The host of each rank.
LAYOUTS = [
    [0],
    [0, 0],
    [0, 0, 0],
    [0, 0, 0, 0],
    [0] * 5,
    [0] * 8,
    [0, 0, 1, 1],
    [0, 0, 0, 1],
    [0, 1, 0, 1],
    [0, 1, 2, 3],
    [0, 1, 2],
]
FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FOLDS = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PROD: torch.mul,
}
# AVG of integers is refused: see BAD_CALLS.
DTYPES_AND_OPS = [
    (dtype, op)
    for dtype in REDUCIBLE
    for op in FOLDS
    if dtype.is_floating_point or op is not ReduceOp.AVG
]
MULTI_PIECE = (1 << 20) + 3  # elements; more than any staging piece holds

laws = settings(max_examples=100)


def layout_id(hosts):
    return "".join(map(str, hosts))


def counts(world_size):
    return [0, 1, world_size - 1, world_size, world_size + 1, 1000]


def tensor_of(rank, shape, dtype, seed=0):
    """Rank ``rank``'s input, which every rank can compute: floats whose sums must be rounded."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)


def whole_numbers(rank, shape, dtype, seed=0):
    """Inputs whose sums are exact in every order: of at most 8 ranks, below 2^8 for bfloat16."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def canonical_fold(inputs, hosts, op):
    """The ranks of a host in rank order, then the hosts in order; rounded once, at the end."""
    dtype = inputs[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    fold = FOLDS[op]
    of_hosts = [functools.reduce(fold, [inputs[rank].to(wide) for rank in host]) for host in hosts]
    result = functools.reduce(fold, of_hosts)
    if op is ReduceOp.AVG:
        result = result / len(inputs)
    return result.to(dtype)


def bits(t):
    return t.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_bits(actual, expected, what=""):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert bits(actual) == bits(expected), what


def reduced(t: Tensor, group: Group, op: ReduceOp, algorithm: Algorithm) -> Tensor:
    """``all_reduce`` with the algorithm between hosts chosen."""
    output = torch.empty_like(t)
    group.all_reduce(
        t.data_ptr(), output.data_ptr(), t.numel(), REDUCIBLE[t.dtype], op, algorithm=algorithm
    )
    return output


# Bodies take the group, so that they run on loopback ranks and under mpirun alike.


def check_fold(group, count, dtype, op, algorithm=Algorithm.AUTO, seed=0):
    inputs = [tensor_of(rank, (count,), dtype, seed) for rank in range(group.size)]
    result = reduced(inputs[group.rank], group, op, algorithm)
    assert_same_bits(result, canonical_fold(inputs, group.hosts, op))


def check_moves(group, dtype):
    p = group.size
    inputs = [tensor_of(rank, (3, 5), dtype, seed=1) for rank in range(p)]
    mine = inputs[group.rank]
    for root in range(p):
        assert_same_bits(broadcast(mine, root, group=group), inputs[root])
        overwritten = mine.clone()
        broadcast_(overwritten, root, group=group)
        assert_same_bits(overwritten, inputs[root])
    assert_same_bits(all_gather(mine, group=group), torch.stack(inputs))
    assert_same_bits(mine, inputs[group.rank], "inputs are left as they were")
    for shape in [(p, 3, 5), (p * 3, 5)]:
        output = torch.empty(shape, dtype=dtype)
        all_gather_into(output, mine, group=group)
        assert_same_bits(output.view(p, 3, 5), torch.stack(inputs))


def check_layouts(group):
    """Strided, transposed, channels-last, zero-dimensional and empty tensors."""
    p = group.size
    base = [whole_numbers(rank, (4, 6, 2, 3), torch.float32) for rank in range(p)]
    views = [
        lambda t: t[:, ::2],
        lambda t: t.transpose(0, 3),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t[0, 0, 0, 0],
        lambda t: t[:0],
        lambda t: t[0, 0].expand(5, 2, 3),
        lambda t: t.view(2, 2, 1, 1, 1, 6, 1, 2, 3, 1),
    ]
    for view in views:
        inputs = [view(t) for t in base]
        mine = inputs[group.rank]
        expected = functools.reduce(torch.add, inputs)
        result = all_reduce(mine, group=group)
        assert_same_bits(result, expected)
        assert result.stride() == torch.empty_like(mine).stride()
        last = broadcast(mine, p - 1, group=group)
        assert_same_bits(last, inputs[-1])
        assert_same_bits(all_gather(mine, group=group), torch.stack(inputs))

        dense = torch.empty_like(mine).copy_(mine)
        all_reduce_(dense, group=group)
        assert_same_bits(dense, expected)
        dense.copy_(mine)
        broadcast_(dense, p - 1, group=group)
        assert_same_bits(dense, inputs[-1])


def check_async(group):
    p, rank = group.size, group.rank
    tensors = [torch.full((size,), float(rank + size)) for size in (1, 1000, 70000, 3)]
    works = [all_reduce_(t, group=group, async_op=True) for t in tensors]
    new = all_reduce(torch.full((2, 3), rank).t(), group=group, async_op=True)
    sent = broadcast(torch.tensor(rank), p - 1, group=group, async_op=True)
    gathered = all_gather(torch.tensor(rank), group=group, async_op=True)
    fence = barrier(group=group, async_op=True)
    fence.wait()
    assert all(work.done() for work in [*works, new, sent, gathered])
    for t, work in zip(tensors, works, strict=True):
        assert work.wait() is None
        assert work.seconds >= 0
        size = len(t)
        assert_same_bits(t, torch.full((size,), float(sum(r + size for r in range(p)))))
    total = sum(range(p))
    assert torch.equal(new.wait(), torch.full((3, 2), total))
    assert new.wait() is new.wait()
    assert sent.wait() == p - 1
    assert gathered.wait().tolist() == list(range(p))


# ----------------------------------------------------------------------------------------- laws


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
    dtype=st.sampled_from([t for t in REDUCIBLE if t is not torch.uint8]),
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


# ------------------------------------------------------------------------- moves, layouts, async


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 1, 0, 1], [0, 1, 2]], ids=layout_id)
def test_moves_of_every_dtype(hosts):
    def body(group):
        for dtype in MOVABLE:
            check_moves(group, dtype)

    run_ranks(len(hosts), body, hosts=hosts)


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 0, 1, 1]], ids=layout_id)
def test_layouts(hosts):
    run_ranks(len(hosts), check_layouts, hosts=hosts)


def test_large_moves():
    def body(group):
        t = torch.arange(MULTI_PIECE) * (group.rank + 1)
        assert torch.equal(broadcast(t, 2, group=group), torch.arange(MULTI_PIECE) * 3)
        for rank, row in enumerate(all_gather(t, group=group)):
            assert torch.equal(row, torch.arange(MULTI_PIECE) * (rank + 1))

    run_ranks(4, body, hosts=[0, 0, 0, 1])


def test_gather_into_memory_of_the_input():
    def body(group):
        output = torch.full((group.size, 4), float(group.rank))
        all_gather_into(output, output[group.rank], group=group)
        assert torch.equal(output, torch.arange(3.0).unsqueeze(1).expand(3, 4))

    run_ranks(3, body)


def test_conjugated_and_negated_views():
    def body(group):
        z = torch.tensor([1 + 2j, 3 - 1j]) * (group.rank + 1)
        assert torch.equal(all_gather(z.conj(), group=group)[1], torch.tensor([2 - 4j, 6 + 2j]))
        assert torch.equal(broadcast(z.conj(), 1, group=group), torch.tensor([2 - 4j, 6 + 2j]))
        assert torch.equal(all_reduce(z.conj().imag, group=group), torch.tensor([-6.0, 3.0]))
        with pytest.raises(InvalidArgumentError, match="lazily conjugated"):
            broadcast_(z.conj(), group=group)

    run_ranks(2, body)


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 0, 1, 1]], ids=layout_id)
def test_asynchronous_calls(hosts):
    run_ranks(len(hosts), check_async, hosts=hosts)


def test_a_dropped_work_keeps_its_tensor():
    def body(group):
        for _ in range(50):
            all_reduce_(torch.ones(1000), group=group, async_op=True)
            gc.collect(0)
        result = torch.ones(1000)
        all_reduce_(result, group=group, async_op=True).wait()
        assert torch.equal(result, torch.full((1000,), 2.0))

    run_ranks(2, body, hosts=[0, 1])


def test_barrier_waits_for_the_last():
    entered = [0.0] * 3

    def body(group):
        time.sleep(0.05 * group.rank)
        entered[group.rank] = time.monotonic()
        barrier(group=group)
        assert time.monotonic() >= max(entered)
        assert min(entered) > 0

    run_ranks(3, body)


# -------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.AVG])
def test_gradient_of_all_reduce(op):
    """With loss_r = r * sum(all_reduce(x)), every x has gradient op(0, ..., p-1)."""

    def body(group):
        x = torch.ones(3, requires_grad=True)
        (group.rank * all_reduce(x, op, group=group).sum()).backward()
        total = sum(range(group.size))
        assert torch.equal(x.grad, torch.full((3,), total / (4 if op is ReduceOp.AVG else 1)))

    run_ranks(4, body)


def test_autograd_notices_overwritten_tensors():
    def body(group):
        w = torch.ones(3, requires_grad=True)
        x = torch.ones(3)
        y = (w * x).sum()
        all_reduce_(x, group=group)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
        with pytest.raises(InvalidArgumentError, match="computed from tensors that require"):
            all_reduce_(w * 2, group=group)
        all_reduce_(w, group=group)  # a leaf: as under no_grad
        assert torch.equal(w.detach(), torch.full((3,), 2.0))

    run_ranks(2, body)


# ------------------------------------------------------------------------------------- bad input


BAD_CALLS = {
    "integer AVG": (
        lambda g: all_reduce_(torch.ones(2, dtype=torch.int32), ReduceOp.AVG, group=g),
        "all_reduce_ on rank 0: AVG needs a floating dtype, and t has torch.int32",
    ),
    "bool": (
        lambda g: all_reduce(torch.ones(2, dtype=torch.bool), group=g),
        "all_reduce on rank 0: t has torch.bool; supported are uint8, .*MAX is a logical or",
    ),
    "complex": (
        lambda g: all_reduce_(torch.ones(2, dtype=torch.complex64), group=g),
        "t has torch.complex64; .*view_as_real",
    ),
    "unknown dtype": (
        lambda g: broadcast_(torch.ones(2).to(torch.float8_e5m2), group=g),
        r"broadcast_ on rank 0: t has torch.float8_e5m2; .*view\(torch.uint8\)",
    ),
    "device": (
        lambda g: all_reduce_(torch.ones(2, device="meta"), group=g),
        r"t is on meta, and pycomm moves CPU tensors only.*Pass t.cpu\(\)",
    ),
    "layout": (
        lambda g: all_reduce_(torch.eye(2).to_sparse(), group=g),
        r"t has layout torch.sparse_coo. Pass t.to_dense\(\)",
    ),
    "type": (lambda g: all_reduce([1.0], group=g), "t is a list. Pass a torch.Tensor"),
    "op": (lambda g: all_reduce_(torch.ones(2), "sum", group=g), "op is 'sum'"),
    "strides": (
        lambda g: all_reduce_(torch.ones(4, 6)[:, ::2], group=g),
        r"t of shape \(4, 3\) has strides \(6, 2\).*Pass a contiguous tensor",
    ),
    "overlap": (lambda g: broadcast_(torch.ones(1).expand(3), group=g), r"strides \(0,\)"),
    "root too large": (
        lambda g: broadcast_(torch.ones(2), 2, group=g),
        "root is 2, and the group has 2 ranks.*from 0 to 1",
    ),
    "root negative": (lambda g: broadcast(torch.ones(2), -1, group=g), "root is -1"),
    "root type": (lambda g: broadcast(torch.ones(2), 0.0, group=g), r"root is 0\.0"),
    "timeout": (lambda g: barrier(group=g, timeout_s=0), "barrier on rank 0: timeout_s is 0"),
    "output shape": (
        lambda g: all_gather_into(torch.ones(3, 4), torch.ones(4), group=g),
        r"output has shape \(3, 4\), and 2 ranks' inputs of shape \(4,\) need "
        r"\(2, 4\) or \(8,\).*torch.empty\(\(2, 4\), dtype=torch.float32\)",
    ),
    "output dtype": (
        lambda g: all_gather_into(torch.ones(2, 4).int(), torch.ones(4), group=g),
        "output has torch.int32 and input has torch.float32",
    ),
    "output strides": (
        lambda g: all_gather_into(torch.ones(4, 2).t(), torch.ones(4), group=g),
        r"output of shape \(2, 4\) has strides \(1, 2\)",
    ),
    "gradient of MAX": (
        lambda g: all_reduce(torch.ones(2, requires_grad=True), ReduceOp.MAX, group=g),
        r"autograd follows only a blocking SUM or AVG.*t.detach\(\)",
    ),
}


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_arguments_lose_nothing(case):
    call, message = BAD_CALLS[case]

    def body(group):
        with (
            pytest.raises(InvalidArgumentError, match=f"(?s){message}")
            if group.rank == 0
            else (pytest.raises(ValueError, match="rank 1"))
        ):
            call(group)
        # Nothing was sent: the next call works.
        assert all_reduce(torch.tensor(1), group=group) == 2

    run_ranks(2, body)


# What rank 0 and what the other ranks call, and what every rank's error says of both.
MISMATCHES = {
    "shape": (
        lambda g: all_reduce_(torch.ones(4), group=g),
        lambda g: all_reduce_(torch.ones(5), group=g),
        ["of 4 float32", "of 5 float32"],
    ),
    "shape, same count": (
        lambda g: all_reduce_(torch.ones(2, 3), group=g),
        lambda g: all_reduce_(torch.ones(3, 2), group=g),
        ["(2, 3)", "(3, 2)"],
    ),
    "dtype": (
        lambda g: all_reduce_(torch.ones(4), group=g),
        lambda g: all_reduce_(torch.ones(4, dtype=torch.int32), group=g),
        ["float32", "int32"],
    ),
    "op": (
        lambda g: all_reduce_(torch.ones(4), ReduceOp.MIN, group=g),
        lambda g: all_reduce_(torch.ones(4), ReduceOp.MAX, group=g),
        ["MIN", "MAX"],
    ),
    "root": (
        lambda g: broadcast_(torch.ones(4), 0, group=g),
        lambda g: broadcast_(torch.ones(4), 1, group=g),
        ["root 0", "root 1"],
    ),
    "order": (
        lambda g: (all_reduce_(torch.ones(4), group=g), barrier(group=g)),
        lambda g: (barrier(group=g), all_reduce_(torch.ones(4), group=g)),
        ["all_reduce", "barrier"],
    ),
    "count of calls": (
        lambda g: barrier(group=g),
        lambda g: (all_gather(torch.ones(4), group=g), barrier(group=g)),
        ["barrier", "all_gather"],
    ),
    "memory order": (
        lambda g: all_reduce_(torch.ones(2, 3), group=g),
        lambda g: all_reduce_(torch.ones(3, 2).t(), group=g),
        ["all_reduce of 6", "memory order (1, 0)"],
    ),
    "complex and bytes": (
        lambda g: broadcast_(torch.ones(2, dtype=torch.complex64), group=g),
        lambda g: broadcast_(torch.ones(16, dtype=torch.uint8), group=g),
        ["torch.complex64", "broadcast of 16 uint8"],
    ),
}


@pytest.mark.parametrize("hosts", [[0, 0], [0, 0, 0, 0], [0, 1], [0, 0, 1, 1]], ids=layout_id)
@pytest.mark.parametrize("case", list(MISMATCHES))
def test_a_mismatch_is_raised_on_all_ranks(case, hosts):
    on_first, on_others, sides = MISMATCHES[case]

    def body(group):
        with pytest.raises(MismatchError) as raised:
            (on_first if group.rank == 0 else on_others)(group)
        with pytest.raises(MismatchError):  # the group is finished
            barrier(group=group)
        return str(raised.value)

    for text in run_ranks(len(hosts), body, hosts=hosts, timeout_s=20):
        for side in sides:
            assert side in text
        assert "Every rank must issue the same collectives" in text


def test_a_missing_peer_is_a_timeout_that_names_it():
    def body(group):
        if group.rank == 0:
            with pytest.raises(CommTimeoutError, match="rank 1"):
                all_reduce(torch.ones(3), group=group, timeout_s=0.2)
        else:
            time.sleep(0.5)
            with pytest.raises(CommError):
                all_reduce(torch.ones(3), group=group)

    run_ranks(2, body, timeout_s=20)


# ------------------------------------------------------------------------------------- run_ranks


def test_run_ranks_names_the_rank_that_raised():
    def body(group):
        if group.rank == 2:
            raise KeyError("lost")
        barrier(group=group)

    with pytest.raises(RankError, match="rank 2 of 3: KeyError: 'lost'") as raised:
        run_ranks(3, body)
    assert isinstance(raised.value.__cause__, KeyError)


def test_run_ranks_shows_where_ranks_hang():
    def body(group):
        if group.rank == 0:
            barrier(group=group)
        else:
            time.sleep(1.5)

    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0, 1\] of 2 .*in barrier.*in body"):
        run_ranks(2, body, timeout_s=0.5)


# ---------------------------------------------------------------------------------- under mpirun


@pytest.mark.mpi
def test_folds_of_processes():
    pycomm.init()
    group = world_group()
    for count in [*counts(group.size), MULTI_PIECE]:
        for dtype in (torch.bfloat16, torch.float64):
            check_fold(group, count, dtype, ReduceOp.AVG)


@pytest.mark.mpi
def test_moves_of_processes():
    pycomm.init()
    check_moves(world_group(), torch.complex64)
    check_moves(world_group(), torch.float32)


@pytest.mark.mpi
def test_layouts_of_processes():
    pycomm.init()
    check_layouts(world_group())


@pytest.mark.mpi
def test_asynchronous_calls_of_processes():
    pycomm.init()
    check_async(world_group())
