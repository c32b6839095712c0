"""Grouped forms give what a call for each tensor gives, bit for bit."""

import threading

import pytest
import torch
from collective_cases import assert_same_bits, layout_id, tensor_of
from run_ranks import run_ranks

import pycomm
from pycomm import CommTimeoutError, ReduceOp

LAYOUTS = [[0], [0, 0, 0], [0, 1, 0, 1]]


def tensors_of(rank, p):
    """Three dtypes, taking turns; strided, empty and zero-dimensional ones among them."""
    return [
        tensor_of(rank, (p, 3), torch.float32, seed=1),
        tensor_of(rank, (2 * p, 2), torch.bfloat16, seed=2),
        tensor_of(rank, (5, 2 * p), torch.float32, seed=3).t(),
        tensor_of(rank, (p, 0), torch.float32),
        tensor_of(rank, (p,), torch.complex64, seed=4).conj(),
        tensor_of(rank, (3 * p,), torch.bfloat16, seed=5),
    ]


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
def test_grouped_forms_that_return(hosts, async_op):
    def body(group):
        tensors = tensors_of(group.rank, group.size)
        for one, grouped, arguments in [
            (pycomm.all_reduce, pycomm.all_reduce_grouped, (ReduceOp.AVG,)),
            (pycomm.all_gather, pycomm.all_gather_grouped, ()),
            (pycomm.reduce_scatter, pycomm.reduce_scatter_grouped, (ReduceOp.SUM,)),
        ]:
            results = grouped(tensors, *arguments, group=group, async_op=async_op)
            results = results.wait() if async_op else results
            assert len(results) == len(tensors)
            for t, result in zip(tensors, results, strict=True):
                assert_same_bits(result, one(t, *arguments, group=group).contiguous())
                assert result.is_contiguous()

    run_ranks(len(hosts), body, hosts=hosts)


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
def test_grouped_forms_that_overwrite(hosts, async_op):
    def body(group):
        p = group.size
        tensors = [t.resolve_conj() for t in tensors_of(group.rank, p)]
        expected = [pycomm.all_reduce(t, group=group) for t in tensors]
        versions = [t._version for t in tensors]
        work = pycomm.all_reduce_grouped_(tensors, group=group, async_op=async_op)
        assert work.wait() is None if async_op else work is None
        for t, whole, version in zip(tensors, expected, versions, strict=True):
            assert_same_bits(t, whole)
            assert t._version > version

        tensors = [t.resolve_conj() for t in tensors_of(group.rank, p)]
        work = pycomm.broadcast_grouped_(tensors, p - 1, group=group, async_op=async_op)
        assert work.wait() is None if async_op else work is None
        for t, theirs in zip(tensors, tensors_of(p - 1, p), strict=True):
            assert_same_bits(t, theirs)

    run_ranks(len(hosts), body, hosts=hosts)


def test_no_tensors_are_no_operation():
    def body(group):
        assert pycomm.all_reduce_grouped([], group=group) == []
        assert pycomm.all_gather_grouped([], group=group, async_op=True).wait() == []
        assert pycomm.all_reduce_grouped_([], group=group) is None

    run_ranks(1, body)


@pytest.mark.parametrize("async_op", [False, True])
def test_an_empty_list_waits_for_the_others_as_long_as_it_was_told(async_op):
    told = threading.Event()

    def finish(group):
        if group.rank > 0:
            told.wait(20)
            return pycomm.barrier(group=group)
        work = pycomm.all_reduce_grouped_([], group=group, timeout_s=0.2, async_op=async_op)
        return work.wait()

    def body(group):
        with pytest.raises(CommTimeoutError, match=r"barrier.* timeout after"):
            finish(group)
        told.set()

    run_ranks(2, body)
