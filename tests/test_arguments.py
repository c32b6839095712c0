"""Bad calls are refused before anything is sent; calls that differ raise on all ranks."""

import re
import time

import numpy
import pytest
import torch
from collective_cases import layout_id
from run_ranks import run_ranks

from pycomm import (
    CommError,
    CommTimeoutError,
    DistributedOptimizer,
    InvalidArgumentError,
    Mesh,
    MismatchError,
    ReduceOp,
    all_gather,
    all_gather_into,
    all_gather_list,
    all_reduce,
    all_reduce_,
    all_reduce_grouped,
    all_reduce_grouped_,
    all_to_all,
    all_to_all_into,
    barrier,
    broadcast,
    broadcast_,
    broadcast_grouped_,
    broadcast_parameters,
    gather_list,
    new_group,
    reduce,
    reduce_scatter,
    reduce_scatter_into,
    scatter,
    scatter_into,
)


def overlapping_gather(group):
    output = torch.ones(2, 4)
    all_gather_into(output, output[1 - group.rank], group=group)


def overlapping_reduce_scatter(group):
    input = torch.ones(4, 3)
    reduce_scatter_into(input[1:3], input, group=group)


def overlapping_all_to_all(group):
    t = torch.ones(4)
    all_to_all_into(t, t, group=group)


SGD = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
QUANTIZED = torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.quint8)

BAD_CALLS = {
    "integer AVG": (
        lambda g: all_reduce_(torch.ones(2, dtype=torch.int32), ReduceOp.AVG, group=g),
        "all_reduce_ on rank 0: AVG needs a floating dtype, and t has torch.int32",
    ),
    "complex MAX": (
        lambda g: all_reduce_(torch.ones(2, dtype=torch.complex64), ReduceOp.MAX, group=g),
        "complex numbers are reduced with SUM and AVG, and op is MAX.*view_as_real",
    ),
    "bits of floats": (
        lambda g: all_reduce(torch.ones(2), ReduceOp.BXOR, group=g),
        "BXOR needs an integer dtype or bool, and t has torch.float32",
    ),
    "float8 sum": (
        lambda g: all_reduce(torch.ones(2).to(torch.float8_e5m2), group=g),
        r"all_reduce on rank 0: t has torch.float8_e5m2; .*only moved: .*to\(torch.bfloat16\)",
    ),
    "unknown dtype": (
        lambda g: broadcast_(torch.ones(2).to(torch.uint16), group=g),
        r"broadcast_ on rank 0: t has torch.uint16; .*view\(torch.uint8\)",
    ),
    "scaled integers": (
        lambda g: all_reduce_(torch.ones(2).int(), prescale=0.5, group=g),
        "prescale is 0.5, and torch.int32 has no fractions",
    ),
    "scale type": (
        lambda g: reduce(torch.ones(2), postscale="2", group=g),
        "reduce on rank 0: postscale is '2'. Pass a number",
    ),
    "algorithm": (
        lambda g: all_reduce_(torch.ones(2), algorithm="tree", group=g),
        "algorithm is 'tree'.\n  Pass 'direct', 'ring', 'gather_fold'",
    ),
    "algorithm in a list": (
        lambda g: all_reduce(torch.ones(2), algorithm=["ring"], group=g),
        r"algorithm is \['ring'\]",
    ),
    "bytes of wider numbers": (
        lambda g: all_reduce(torch.ones(2).to(torch.uint16), group=g),
        r"t has torch.uint16; .*such as t.to\(torch.int64\)",
    ),
    "quantized": (
        lambda g: broadcast(QUANTIZED, group=g),
        r"t has torch.quint8; .*Pass t.dequantize\(\)",
    ),
    "device": (
        lambda g: all_reduce_(torch.ones(2, device="meta"), group=g),
        r"t is on meta, and pycomm moves CPU and CUDA tensors only.*Pass t.cpu\(\)",
    ),
    "layout": (
        lambda g: all_reduce_(torch.eye(2).to_sparse(), group=g),
        r"t has layout torch.sparse_coo. Pass t.to_dense\(\)",
    ),
    "nested": (
        lambda g: all_reduce(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), group=g),
        r"t is a nested tensor, of several shapes.*Pass the tensors of t.unbind\(\)",
    ),
    "jagged": (
        lambda g: all_reduce_(
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), group=g
        ),
        "t is a nested tensor",
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
        r"\(2, 4\) or \(8,\).*input.new_empty\(\(2, 4\)\)",
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
        r"autograd follows only SUM and AVG, not MAX.*all_gather\(t\).amax\(0\)",
    ),
    "gradient of an asynchronous call": (
        lambda g: all_gather(torch.ones(2, requires_grad=True), group=g, async_op=True),
        "autograd follows only a blocking call",
    ),
    "gradient of gather_list": (
        lambda g: gather_list(torch.ones(2, requires_grad=True), group=g),
        r"does not follow this call.\n  Pass t.detach\(\), or use all_gather_list",
    ),
    "shards": (
        lambda g: reduce_scatter(torch.ones(5, 2), group=g),
        r"t.shape\[0\] is 5, which world size 2 does not divide.\n  Pad dimension 0 to 6",
    ),
    "no dimension": (
        lambda g: all_to_all(torch.tensor(1), group=g),
        "t has no dimension to cut into 2 blocks",
    ),
    "reduce_scatter output": (
        lambda g: reduce_scatter_into(torch.ones(4), torch.ones(4), group=g),
        r"output has shape \(4,\).* need \(2,\)",
    ),
    "input inside the output": (
        lambda g: overlapping_gather(g),
        r"input lies in the memory of output, elsewhere .*input.clone\(\)",
    ),
    "output inside the input": (
        lambda g: overlapping_reduce_scatter(g),
        r"output lies in the memory of input, elsewhere .*output.clone\(\)",
    ),
    "all_to_all in place": (
        lambda g: overlapping_all_to_all(g),
        "output and input have memory in common",
    ),
    "number of splits": (
        lambda g: all_to_all(torch.ones(3), [3], group=g),
        r"input_splits is \[3\], and the group has 2 ranks",
    ),
    "sum of splits": (
        lambda g: all_to_all(torch.ones(3), [1, 1], [1, 1], group=g),
        r"input_splits are \[1, 1\], 2 rows together, and the tensor has shape \(3,\)",
    ),
    "one split": (
        lambda g: all_to_all(torch.ones(4), 2, group=g),
        "input_splits is 2, and the group has 2 ranks",
    ),
    "negative split": (
        lambda g: all_to_all_into(torch.ones(3), torch.ones(3), [4, -1], group=g),
        r"input_splits is \[4, -1\]",
    ),
    "all_to_all output": (
        lambda g: all_to_all_into(torch.ones(3), torch.ones(4), group=g),
        r"output has shape \(3,\) .*the result has shape \(4,\)",
    ),
    "scatter output": (
        lambda g: scatter_into(torch.ones(4, 2).t(), torch.ones(2, 4, 2), 0, group=g),
        "output is not row-major",
    ),
    "timeout in words": (
        lambda g: all_reduce(torch.ones(2), timeout_s="soon", group=g),
        "timeout_s is 'soon'",
    ),
    "type of a root": (
        lambda g: broadcast_(torch.ones(2), 0.0, group=g),
        "root is 0.0 of type float, and the group has 2 ranks",
    ),
    "a root that is true": (
        lambda g: broadcast_(torch.ones(2), True, group=g),
        "root is True of type bool",
    ),
    "color": (
        lambda g: g.split("red"),
        "split on rank [01]: color is 'red'",
    ),
    "key": (
        lambda g: g.split(0, 0.5),
        "split on rank [01]: key is 0.5",
    ),
    "opaque layout": (
        lambda g: all_reduce(torch.ones(4).to_mkldnn(), group=g),
        "t has layout torch._mkldnn",
    ),
    "grouped twice": (
        lambda g: broadcast_grouped_([a := torch.ones(2), torch.ones(3), a], group=g),
        r"tensors\[0\] and tensors\[2\] have memory in common",
    ),
    "grouped overlap": (
        lambda g: all_reduce_grouped_([(a := torch.ones(3))[1:], a[:2]], group=g),
        r"tensors\[1\] and tensors\[0\] have memory in common",
    ),
    "grouped dtype": (
        lambda g: all_reduce_grouped([torch.ones(2), torch.ones(2, device="meta")], group=g),
        r"all_reduce_grouped on rank 0: tensors\[1\] is on meta",
    ),
    "grouped tensor": (
        lambda g: all_reduce_grouped(torch.ones(2), group=g),
        "tensors is a Tensor. Pass a list of tensors",
    ),
    "grouped generator": (
        lambda g: all_reduce_grouped((t for t in [torch.ones(2)]), group=g),
        "all_reduce_grouped on rank 0: tensors is a generator. Pass a list",
    ),
    "grouped nothing": (
        lambda g: broadcast_grouped_(None, group=g),
        "broadcast_grouped_ on rank 0: tensors is a NoneType",
    ),
    "group of what": (
        lambda g: new_group(1, group=g),
        r"new_group on rank 0: ranks is 1.\n  Pass a list of ranks",
    ),
    "mesh without names": (
        lambda g: Mesh([2], group=g),
        r"Mesh on rank 0: axes is \[2\].\n  Pass a dict",
    ),
    "grouped part of a graph": (
        lambda g: broadcast_grouped_([torch.ones(2, requires_grad=True) * 2], group=g),
        r"tensors\[0\] was computed from tensors that require",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
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


@pytest.mark.parametrize("call", [barrier, lambda group: all_reduce(torch.ones(2), group=group)])
def test_a_group_is_a_group(call):
    with pytest.raises(InvalidArgumentError, match=r": group is \[0, 1\].\n  Pass what new_group"):
        call(group=[0, 1])


@pytest.mark.parametrize("make", [Mesh, lambda axes, group: DistributedOptimizer(SGD, group=group)])
def test_what_is_made_of_a_group_asks_for_one(make):
    with pytest.raises(InvalidArgumentError, match=r"(Mesh|DistributedOptimizer): group is 3"):
        make({"dp": 2}, group=3)


def test_a_module_has_no_names_by_itself():
    def body(group):
        with pytest.raises(
            InvalidArgumentError, match=r"named_parameters is a Linear.\n  Pass model"
        ):
            DistributedOptimizer(SGD, torch.nn.Linear(1, 1), group=group)
        with pytest.raises(InvalidArgumentError, match=r"parameters is a int. Pass model"):
            broadcast_parameters(3, group=group)

    run_ranks(2, body)


def test_numbers_may_be_numpys():
    def body(group):
        t = torch.tensor(float(group.rank))
        broadcast_(t, numpy.int64(1), group=group)
        assert t == 1
        assert group.split(numpy.int32(0), numpy.int64(-group.rank)).rank == 1 - group.rank
        scaled = all_reduce(t, prescale=numpy.float32(0.5), timeout_s=numpy.float32(9), group=group)
        assert scaled == 1
        splits = numpy.array([1, 2])
        assert all_to_all(torch.ones(3), splits, group=group).shape == (2 * (group.rank + 1),)
        assert Mesh({"dp": numpy.int64(2)}, group=group).shape == {"dp": 2}

    run_ranks(2, body)


BAD_SCATTERS = {
    "nothing": (None, "t is None on the root"),
    "rows": (torch.ones(3, 2), r"t has shape \(3, 2\), and 2 ranks need a row each"),
    "dtype": (torch.ones(2, 2).to(torch.uint16), "t has torch.uint16"),
    "dimensions": (torch.ones([2] + [1] * 65), "t has 66 dimensions"),
}


@pytest.mark.parametrize("case", list(BAD_SCATTERS))
def test_what_the_root_cannot_scatter_raises_everywhere(case):
    t, message = BAD_SCATTERS[case]

    def body(group):
        ours = "scatter on rank 0: " if group.rank == 0 else "on rank 1: refused by the root: .*"
        with pytest.raises(InvalidArgumentError, match=f"(?s){ours}{message}"):
            scatter(t, group=group)
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
        ["all_reduce of 6", "memory order (1, 0)", "Pass t.contiguous() on every rank"],
    ),
    "complex and bytes": (
        lambda g: broadcast_(torch.ones(2, dtype=torch.complex64), group=g),
        lambda g: broadcast_(torch.ones(16, dtype=torch.uint8), group=g),
        ["broadcast of 2 complex64", "broadcast of 16 uint8"],
    ),
    "scale": (
        lambda g: all_reduce_(torch.ones(4), prescale=0.5, group=g),
        lambda g: all_reduce_(torch.ones(4), postscale=0.5, group=g),
        ["inputs times 0.5", "result times 0.5"],
    ),
    "dtypes of a list": (
        lambda g: all_gather_list(torch.ones(4), group=g),
        lambda g: all_gather_list(torch.ones(4).int(), group=g),
        ["all_gather_list of torch.float32", "all_gather_list of torch.int32"],
    ),
    "shapes of a group of tensors": (
        lambda g: all_reduce_grouped_([torch.ones(2), torch.ones(3)], group=g),
        lambda g: all_reduce_grouped_([torch.ones(3), torch.ones(2)], group=g),
        ["2 of 2 tensors: (2,) (3,)", "2 of 2 tensors: (3,) (2,)"],
    ),
    "an empty list": (
        lambda g: all_reduce_grouped_([], group=g),
        lambda g: all_reduce_grouped_([torch.ones(2)], group=g),
        ["barrier", "1 of 1 tensors: (2,)"],
    ),
    "a longer list of two dtypes": (
        lambda g: all_reduce_grouped_([torch.ones(2)], group=g),
        lambda g: all_reduce_grouped_([torch.ones(2), torch.ones(2).int()], group=g),
        ["1 of 1 tensors: (2,)", "1 of 2 tensors: (2,)"],
    ),
    "splits given or not": (
        lambda g: all_to_all(torch.ones(g.size), [1] * g.size, [1] * g.size, group=g),
        lambda g: all_to_all(torch.ones(g.size), group=g),
        ["of blocks of different lengths of float32", "all_to_all of 1 float32"],
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
        remedy = text.splitlines()[-1]
        assert re.search(r"Every rank must|Pass t.contiguous\(\) on every rank", remedy)


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
