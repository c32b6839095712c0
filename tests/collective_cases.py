"""What tests of collectives share: where ranks lie, inputs every rank can compute, the fold."""

import functools

import torch
from torch import Tensor

from pycomm import ReduceOp
from pycomm._core import Algorithm, Group
from pycomm.arguments import REDUCIBLE

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
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}
BITWISE = {ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR}


def can_reduce(dtype, op):
    """What is refused otherwise: see BAD_CALLS."""
    if dtype.is_complex:
        return op in (ReduceOp.SUM, ReduceOp.AVG)
    return op not in BITWISE if dtype.is_floating_point else op is not ReduceOp.AVG


DTYPES_AND_OPS = [(dtype, op) for dtype in REDUCIBLE for op in FOLDS if can_reduce(dtype, op)]
MULTI_PIECE = (1 << 20) + 3  # elements; more than any staging piece holds


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
        parts = torch.view_as_real(result) if dtype.is_complex else result
        parts.div_(len(inputs))
    return result.to(dtype)


def bits(t):
    return t.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()


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
