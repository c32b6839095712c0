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


def goes_the_long_way(call):
    """Whether ``call()`` enters a Python function of pycomm's."""
    entered = []

    def note(frame, event, _):
        if event == "call" and frame.f_globals["__name__"].startswith("pycomm."):
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return bool(entered)


# By name: the call on inputs and outputs that every rank makes alike.
FORMS = {
    "all_reduce_": lambda i, o, **more: pycomm.all_reduce_(o, ReduceOp.MAX, **more),
    "broadcast_": lambda i, o, **more: pycomm.broadcast_(o, 1, **more),
    "reduce_": lambda i, o, **more: pycomm.reduce_(o, 1, ReduceOp.AVG, **more),
    "reduce_ by keyword": lambda i, o, **more: pycomm.reduce_(o, op=ReduceOp.SUM, root=1, **more),
    "all_gather_into rows": lambda i, o, **more: pycomm.all_gather_into(o, i, **more),
    "all_gather_into stacked": lambda i, o, **more: pycomm.all_gather_into(
        o.view(2, 2, 3), i, **more
    ),
    "all_gather_into in place": lambda i, o, **more: pycomm.all_gather_into(
        o, o[2 * more["group"].rank :][:2], **more
    ),
    "reduce_scatter_into": lambda i, o, **more: pycomm.reduce_scatter_into(
        i, o, ReduceOp.MIN, **more
    ),
    "reduce_scatter_into in place": lambda i, o, **more: pycomm.reduce_scatter_into(
        o[2 * more["group"].rank :][:2], o, **more
    ),
    "all_to_all_into": lambda i, o, **more: pycomm.all_to_all_into(o, o + 1, **more),
    "send and recv": lambda i, o, **more: (
        pycomm.recv(o, 1, tag=7, **more)
        if more["group"].rank == 0
        else pycomm.send(o, 0, tag=7, **more)
    ),
}

# By name: a call that the long way must see, and refuse, on rank 0 of 1.
REFUSED = {
    "root out of range": lambda t: pycomm.broadcast_(t, 1),
    "a root that is no number": lambda t: pycomm.broadcast_(t, "0"),
    "a negative root": lambda t: pycomm.reduce_(t, -1),
    "no op": lambda t: pycomm.reduce_(t, 0, "sum"),
    "AVG of integers": lambda t: pycomm.reduce_(t.int(), 0, ReduceOp.AVG),
    "an output too long": lambda t: pycomm.all_gather_into(torch.empty(2, *t.shape), t),
    "an output of another dtype": lambda t: pycomm.all_gather_into(torch.empty_like(t).int(), t),
    "overlap": lambda t: pycomm.all_gather_into(t[:2], t[1:3]),
    "a scattered output too long": lambda t: pycomm.reduce_scatter_into(torch.empty(5), t),
    "overlap of a scatter": lambda t: pycomm.reduce_scatter_into(t[:2], t[1:3]),
    "in place all to all": lambda t: pycomm.all_to_all_into(t, t),
    "nobody to send to": lambda t: pycomm.send(t, 1),
    "nobody to receive from": lambda t: pycomm.recv(t, 1),
    "a negative tag": lambda t: pycomm.send(t, 0, tag=-1),
}


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


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_short_calls_and_long_ones_meet(form):
    def body(group):
        def buffers():
            scale = group.rank + 1.0
            return torch.arange(6.0).view(2, 3) * scale, torch.arange(12.0).view(4, 3) * scale

        short, long, mixed = buffers(), buffers(), buffers()
        seen = goes_the_long_way(lambda: form(*short, group=group))
        assert not seen
        assert goes_the_long_way(lambda: form(*long, group=group, timeout_s=60))
        form(*mixed, group=group, **({"timeout_s": 60} if group.rank == 1 else {}))
        for a, b, c in zip(short, long, mixed, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
            assert a._version == b._version

    run_ranks(2, body)


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_in_words(world, call):
    with pytest.raises(InvalidArgumentError, match="on rank 0: "):
        call(torch.ones(4))


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
    with pytest.raises(TypeError, match="multiple values for argument 'op'"):
        all_reduce_(t, ReduceOp.SUM, op=ReduceOp.MAX)
    all_reduce_(t, group=None)
    sent = pycomm.isend(t, 0, tag=3)
    assert pycomm.recv(torch.empty(3), 0, tag=3) == 0
    sent.wait()


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
