"""The short way into the core: it takes ordinary tensors, and agrees with the long one."""

import copy
import inspect
import pickle
import sys

import pytest
import torch
from run_ranks import RankError, run_ranks

import pycomm
from pycomm import (
    InvalidArgumentError,
    MismatchError,
    NotInitializedError,
    ReduceOp,
    tensor_calls,
)
from pycomm.arguments import REDUCIBLE
from pycomm.collectives import all_reduce_


class Subclass(torch.Tensor):
    pass


def in_place(group, t, op):
    return tensor_calls.all_reduce(group, t, t, op)


def negated_view():
    return torch.ones(1, dtype=torch.complex64).conj().imag


# bool and complex numbers, which have no MAX, go the long way.
ORDINARY = [dtype for dtype in REDUCIBLE if dtype is not torch.bool and not dtype.is_complex]
# Each of these needs the long way, if only to be refused there.
UNUSUAL = {
    "a subclass": lambda: torch.ones(3).as_subclass(Subclass),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "a leaf with gradient": lambda: torch.ones(3, requires_grad=True),
    "transposed": lambda: torch.ones(3, 4).t(),
    "strided": lambda: torch.ones(6)[::2],
    "expanded": lambda: torch.ones(1).expand(3),
    "empty": lambda: torch.ones(0),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "negated": negated_view,
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "no tensor": lambda: [1.0],
}


ORDINARY = [dtype for dtype in REDUCIBLE if dtype != torch.bool and not dtype.is_complex]


@pytest.fixture
def world():
    pycomm.init()  # nobody launched this: a world of one
    yield
    pycomm.shutdown()


@pytest.fixture(autouse=True)
def only_with_the_exchange_api():
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("torch has it since 2.10")


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_tensors_are_left_alone(make):
    def body(group):
        t = make()
        assert in_place(group, t, ReduceOp.SUM) is False

    run_ranks(1, body)


def test_unusual_arguments_are_left_alone():
    def body(group):
        assert in_place(group, torch.ones(3), "sum") is False
        assert in_place(group, torch.ones(3, dtype=torch.int32), ReduceOp.AVG) is False
        assert in_place("world", torch.ones(3), ReduceOp.SUM) is False

    run_ranks(1, body)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 1, 3), (1,) * 10, (2000, 3)], ids=str)
@pytest.mark.parametrize("dtype", ORDINARY, ids=str)
def test_both_ways_make_the_same_call(dtype, shape):
    def body(group):
        t = torch.full(shape, group.rank + 1).to(dtype)
        if group.rank == 0:
            assert in_place(group, t, ReduceOp.MAX)
        else:
            all_reduce_(t, ReduceOp.MAX, group=group, timeout_s=60)  # which takes the long way
        assert torch.equal(t, torch.full(shape, 3).to(dtype))

    run_ranks(3, body)


def test_autograd_learns_of_the_change():
    def body(group):
        t = torch.ones(3)
        before = t._version
        all_reduce_(t, group=group)
        assert t._version > before
        weight = torch.ones(3, requires_grad=True)
        loss = (weight * t).sum()  # saves t
        all_reduce_(t, group=group)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    run_ranks(2, body)


def test_a_view_is_reduced_where_it_lies():
    def body(group):
        base = torch.zeros(10)
        view = base[2:5]
        view.fill_(group.rank + 1)
        assert in_place(group, view, ReduceOp.SUM)
        assert base.tolist() == [0, 0, 3, 3, 3, 0, 0, 0, 0, 0]

    run_ranks(2, body)


def test_into_another_tensor():
    def body(group):
        t, result = torch.full((3,), group.rank + 1.0), torch.zeros(3)
        assert tensor_calls.all_reduce(group, t, result, ReduceOp.SUM)
        assert t.tolist() == [group.rank + 1.0] * 3
        assert result.tolist() == [3.0] * 3
        for unlike in (
            torch.zeros(4),
            torch.zeros(3, 1),
            torch.zeros(6)[::2],
            torch.zeros(3).int(),
        ):
            assert tensor_calls.all_reduce(group, t, unlike, ReduceOp.SUM) is False

    run_ranks(2, body)


def test_errors_come_through():
    def body(group):
        t = torch.ones(3 + group.rank)
        in_place(group, t, ReduceOp.SUM)

    with pytest.raises(RankError) as caught:
        run_ranks(2, body)
    assert isinstance(caught.value.__cause__, MismatchError)
    assert "all_reduce of 3 float32, shape (3,), SUM" in str(caught.value)


def test_the_function_before_the_function_looks_like_it():
    signature = inspect.signature(all_reduce_)
    assert list(signature.parameters)[:3] == ["t", "op", "prescale"]
    assert inspect.isroutine(all_reduce_)
    assert "Replace ``t``" in inspect.getdoc(all_reduce_)
    assert repr(all_reduce_).startswith("<function all_reduce_ at")
    assert pickle.loads(pickle.dumps(all_reduce_)) is all_reduce_
    assert copy.deepcopy(all_reduce_) is all_reduce_


def test_calls_without_a_group_mean_the_world(world):
    t = torch.full((3,), 2.0)
    all_reduce_(t)
    all_reduce_(t, ReduceOp.AVG)
    all_reduce_(t, op=ReduceOp.MAX, prescale=2.0)
    assert t.tolist() == [4.0] * 3
    with pytest.raises(InvalidArgumentError, match="all_reduce_ on rank 0: op is 1"):
        all_reduce_(t, 1)
    with pytest.raises(TypeError, match=r"all_reduce_\(\) missing 1 required"):
        all_reduce_()
    with pytest.raises(TypeError, match="takes from 1 to 2 positional"):
        all_reduce_(t, ReduceOp.SUM, None)


def test_there_is_no_world_after_shutdown(world):
    t = torch.ones(3)
    all_reduce_(t)
    pycomm.shutdown()
    with pytest.raises(NotInitializedError, match="all_reduce_: called after shutdown"):
        all_reduce_(t)
    pycomm.init()
    before = t._version
    all_reduce_(t)
    assert t._version == before + 1


def test_calls_keep_no_references(world):
    t = torch.ones(3)
    counted = (t, all_reduce_, ReduceOp.SUM, None)
    before = [sys.getrefcount(each) for each in counted]
    for _ in range(10_000):
        all_reduce_(t)
    after = [sys.getrefcount(each) for each in counted]
    assert all(abs(a - b) < 100 for a, b in zip(after, before, strict=True))
