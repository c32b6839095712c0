"""Gradients through collectives, against the same computation in one process.

Each case has a function of one rank and its reference, which takes all inputs and returns all
ranks' results. The loss is the sum over ranks of ``(weight * result).sum()``.
"""

import pytest
import torch
from collective_cases import layout_id
from run_ranks import run_ranks
from torch import Tensor

import pycomm
from pycomm import InvalidArgumentError, ReduceOp, all_reduce_

LAYOUTS = [[0], [0, 0], [0, 0, 0], [0, 1, 0]]
ROOT = 0


def total(inputs):
    return torch.stack(inputs).sum(0)


def scattered(x, group):
    return pycomm.scatter(x if group.rank == ROOT else None, ROOT, group=group)


def ragged(x, group):
    """Rows ``0..rank`` of x, so that shapes differ."""
    return torch.cat(pycomm.all_gather_list(x[: group.rank + 1], group=group))


def uneven(x, group):
    """Everything to the next rank, by splits."""
    p = group.size
    splits = [len(x) if r == (group.rank + 1) % p else 0 for r in range(p)]
    return pycomm.all_to_all(x, splits, group=group)


def grouped(function, x, group):
    return torch.cat([t.flatten() for t in function([x, x[:, :1] * 2], group=group)])


# x has shape (p, 2). On ranks that get nothing the reference is an empty tensor.
CASES = {
    "all_reduce SUM": (
        lambda x, g: pycomm.all_reduce(x, group=g),
        lambda xs: [total(xs)] * len(xs),
    ),
    "all_reduce AVG, scaled": (
        lambda x, g: pycomm.all_reduce(x, ReduceOp.AVG, prescale=0.5, postscale=3.0, group=g),
        lambda xs: [total(xs) * 1.5 / len(xs)] * len(xs),
    ),
    "reduce": (
        lambda x, g: pycomm.reduce(x, ROOT, group=g),
        lambda xs: [total(xs), *[xs[0].new_empty(0)] * (len(xs) - 1)],
    ),
    "reduce AVG, scaled": (
        lambda x, g: pycomm.reduce(x, ROOT, ReduceOp.AVG, prescale=2.0, group=g),
        lambda xs: [total(xs) * 2 / len(xs), *[xs[0].new_empty(0)] * (len(xs) - 1)],
    ),
    "broadcast": (
        lambda x, g: pycomm.broadcast(x, ROOT, group=g),
        lambda xs: [xs[ROOT]] * len(xs),
    ),
    "all_gather": (
        lambda x, g: pycomm.all_gather(x, group=g),
        lambda xs: [torch.stack(xs)] * len(xs),
    ),
    "all_gather, amax": (
        lambda x, g: pycomm.all_gather(x, group=g).amax(0),
        lambda xs: [torch.stack(xs).amax(0)] * len(xs),
    ),
    "all_gather of a transpose": (
        lambda x, g: pycomm.all_gather(x.t(), group=g),
        lambda xs: [torch.stack([x.t() for x in xs])] * len(xs),
    ),
    "reduce_scatter": (
        lambda x, g: pycomm.reduce_scatter(x, group=g),
        lambda xs: [total(xs)[r : r + 1] for r in range(len(xs))],
    ),
    "reduce_scatter AVG, scaled": (
        lambda x, g: pycomm.reduce_scatter(x, ReduceOp.AVG, postscale=2.0, group=g),
        lambda xs: [total(xs)[r : r + 1] * 2 / len(xs) for r in range(len(xs))],
    ),
    "gather": (
        lambda x, g: pycomm.gather(x, ROOT, group=g),
        lambda xs: [torch.stack(xs), *[xs[0].new_empty(0)] * (len(xs) - 1)],
    ),
    "scatter": (scattered, lambda xs: [xs[ROOT][r] for r in range(len(xs))]),
    "all_to_all": (
        lambda x, g: pycomm.all_to_all(x, group=g),
        lambda xs: [torch.stack([x[r] for x in xs]) for r in range(len(xs))],
    ),
    "all_to_all by splits": (uneven, lambda xs: [xs[r - 1] for r in range(len(xs))]),
    "all_gather_list": (
        ragged,
        lambda xs: [torch.cat([x[: r + 1] for r, x in enumerate(xs)])] * len(xs),
    ),
    "all_reduce_grouped": (
        lambda x, g: grouped(pycomm.all_reduce_grouped, x, g),
        lambda xs: [torch.cat([total(xs).flatten(), 2 * total(xs)[:, 0]])] * len(xs),
    ),
    "all_gather_grouped": (
        lambda x, g: grouped(pycomm.all_gather_grouped, x, g),
        lambda xs: (
            [torch.cat([torch.stack(xs).flatten(), 2 * torch.stack(xs)[..., 0].flatten()])]
            * len(xs)
        ),
    ),
    "reduce_scatter_grouped": (
        lambda x, g: grouped(pycomm.reduce_scatter_grouped, x, g),
        lambda xs: [torch.cat([total(xs)[r], 2 * total(xs)[r, :1]]) for r in range(len(xs))],
    ),
}


def input_of(rank: int, p: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(p, 2, dtype=dtype, generator=generator, requires_grad=True)


def loss_of(result: Tensor, rank: int) -> Tensor:
    """Not linear, so that the gradient of the gradient is not zero."""
    weight = torch.arange(1.0, result.numel() + 1).view(result.shape) * (rank + 1)
    squares = (result * result.conj()).real if result.is_complex() else result * result
    return (weight * squares).sum()


# Complex numbers have no order, so no largest one.
CASES_OF_DTYPES = [(case, torch.float64) for case in CASES] + [
    (case, torch.complex128) for case in CASES if "amax" not in case
]


@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize(("case", "dtype"), CASES_OF_DTYPES, ids=str)
def test_gradients_are_those_of_one_process(case, dtype, hosts):
    function, reference = CASES[case]
    p = len(hosts)
    xs = [input_of(rank, p, dtype) for rank in range(p)]
    results = reference(xs)
    loss = sum(loss_of(result, rank) for rank, result in enumerate(results))
    expected = torch.autograd.grad(loss, xs, materialize_grads=True)

    def body(group):
        x = input_of(group.rank, p, dtype)
        result = function(x, group)
        torch.testing.assert_close(result, results[group.rank])
        loss_of(result, group.rank).backward()
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        torch.testing.assert_close(gradient, expected[group.rank])

    run_ranks(p, body, hosts=hosts)


@pytest.mark.parametrize("case", ["all_reduce SUM", "all_gather", "reduce_scatter", "all_to_all"])
def test_gradients_of_gradients(case):
    function, reference = CASES[case]
    xs = [input_of(rank, 2, torch.float64) for rank in range(2)]
    loss = sum(loss_of(result, rank) for rank, result in enumerate(reference(xs)))
    first = torch.autograd.grad(loss, xs, create_graph=True)
    expected = torch.autograd.grad(sum((g**3).sum() for g in first), xs)

    def body(group):
        x = input_of(group.rank, 2, torch.float64)
        loss = loss_of(function(x, group), group.rank)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad((gradient**3).sum(), x)
        torch.testing.assert_close(second, expected[group.rank])

    run_ranks(2, body)


def test_gradcheck():
    """Numerical derivatives: with one rank the sum of all losses is this rank's own."""

    def body(group):
        x = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
        for function, _ in CASES.values():
            assert torch.autograd.gradcheck(lambda x, f=function: f(x, group), x)

    run_ranks(1, body)


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
