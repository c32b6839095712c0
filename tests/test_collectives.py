"""Collectives on tensors: every dtype moves, layouts, asynchronous calls."""

import functools
import gc
import time

import pytest
import torch
from collective_cases import MULTI_PIECE, assert_same_bits, layout_id, tensor_of, whole_numbers
from run_ranks import run_ranks

import pycomm
from pycomm import (
    InvalidArgumentError,
    all_gather,
    all_gather_into,
    all_reduce,
    all_reduce_,
    barrier,
    broadcast,
    broadcast_,
)
from pycomm.arguments import MOVABLE
from pycomm.runtime import world_group

# Bodies take the group, so that they run on loopback ranks and under mpirun alike.


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
