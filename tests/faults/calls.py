"""Faults in which ranks call different things at one position."""

from __future__ import annotations

import time

import torch
from torch import Tensor

import pycomm
from faults.fault import Part, fault
from faults.models import optimizer_of, weights
from pycomm import _core
from pycomm.runtime import world_group


@fault("another shape on a rank", all="MismatchError", hosts=(1, 2))
def another_shape(part: Part) -> None:
    _begin(part)
    pycomm.all_reduce(torch.ones(4 + part.is_victim))


@fault("another dtype", all="MismatchError")
def another_dtype(part: Part) -> None:
    _begin(part)
    pycomm.all_reduce(torch.ones(4, dtype=torch.float64 if part.is_victim else torch.float32))


@fault("another op", all="MismatchError")
def another_op(part: Part) -> None:
    _begin(part)
    pycomm.all_reduce(torch.ones(4), pycomm.ReduceOp.MAX if part.is_victim else pycomm.ReduceOp.SUM)


@fault("another root", all="MismatchError")
def another_root(part: Part) -> None:
    _begin(part)
    pycomm.broadcast(torch.ones(4), root=int(part.is_victim))


@fault("two ranks with other roots, while a third has not come", all="MismatchError")
def another_root_before_all_came(part: Part) -> None:
    if part.rank == 0:
        part.begins()
    if part.is_victim:
        time.sleep(4)
    pycomm.broadcast(torch.ones(4), root=int(part.rank == 2))


@fault("another kind of collective", all="MismatchError")
def another_kind(part: Part) -> None:
    _begin(part)
    if part.is_victim:
        pycomm.broadcast(torch.ones(4), root=0)
    pycomm.all_reduce(torch.ones(4))


@fault("another name (the core's calls, of buckets and parameters, have one)", all="MismatchError")
def another_name(part: Part) -> None:
    _begin(part)
    _named(torch.ones(4), "second" if part.is_victim else "first")


@fault("two tensors in swapped order, of other shapes or names", all="MismatchError")
def swapped_order(part: Part) -> None:
    _begin(part)
    for count in (4, 6) if not part.is_victim else (6, 4):
        pycomm.all_reduce(torch.ones(count))


@fault("two tensors in swapped order, of the same shape and without names: wrong sums", usable=True)
def swapped_order_unnoticed(part: Part) -> None:
    _begin(part)
    first, second = torch.zeros(4), torch.ones(4)
    mine = (second, first) if part.is_victim else (first, second)
    sums = [pycomm.all_reduce(tensor).tolist()[0] for tensor in mine]
    assert sums == [1, 3], sums


@fault("parameters in another order, in `DistributedOptimizer`", all="MismatchError", usable=True)
def parameters_in_another_order(part: Part) -> None:
    _begin(part)
    params = weights()
    optimizer_of(dict(reversed(params.items())) if part.is_victim else params)


def _begin(part: Part) -> None:
    if part.is_victim:
        part.begins()


def _named(tensor: Tensor, name: str) -> None:
    place = tensor.data_ptr()
    float32, plus = _core.DType.FLOAT32, _core.ReduceOp.SUM
    world_group().all_reduce(place, place, tensor.numel(), float32, plus, name=name)
