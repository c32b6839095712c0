"""Training on ranks is training in one process: after 20 steps parameters have the same bits."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PROBLEMS, Branches
from parity import (
    assert_same_parameters,
    bits,
    fold,
    ranks_by_host,
    train_alone,
    train_as_rank,
    train_on_ranks,
)
from run_ranks import run_ranks
from torch import Tensor, nn

import pycomm
from pycomm import _core
from pycomm.gradient_layout import DEFAULT_BUCKET_CAP_BYTES
from pycomm.optimizer import DistributedOptimizer
from pycomm.runtime import world_group

STEPS = 20

# --- what is varied; of each, the cheapest first --------------------------------------------------

MODELS = ["tied", "branches", "convolution", "transformer"]
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = ["0", "00", "000", "012", "0000", "0011"]  # the host of each rank
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01
    ),
    # The default eps, 1e-8, is zero in float16.
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3),
    "lbfgs": lambda model: torch.optim.LBFGS(
        model.parameters(), lr=1.0, max_iter=2, max_eval=4, line_search_fn="strong_wolfe"
    ),
}
BUCKET_CAPS = {
    "each_its_own_bucket": 1,
    "KiB": 1024,
    "default": DEFAULT_BUCKET_CAP_BYTES,
}
PASSES = 3
ACCUMULATIONS: dict[str, dict[str, Any]] = {
    "one_pass": {},
    "no_sync": {"passes": PASSES, "no_sync": True},
    "passes": {"passes": PASSES, "backward_passes_per_step": PASSES},
    "averaged": {
        "passes": PASSES,
        "backward_passes_per_step": PASSES,
        "average_accumulated": True,
    },
}
AXES = [MODELS, list(DTYPES), LAYOUTS, list(OPTIMIZERS), list(BUCKET_CAPS), list(ACCUMULATIONS)]


def covering(axes: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Cases in which any two values of different axes meet: a few dozen instead of the product.

    Each starts from two that have not met yet, and takes from every other axis the value that has
    most to meet.
    """
    points = [[(number, value) for value in axis] for number, axis in enumerate(axes)]
    missing = dict.fromkeys(
        pair for two in itertools.combinations(points, 2) for pair in itertools.product(*two)
    )

    def met_first(case: list[tuple[int, str]]) -> list[tuple[tuple[int, str], ...]]:
        return [pair for pair in itertools.combinations(sorted(case), 2) if pair in missing]

    cases = []
    while missing:
        case = list(next(iter(missing)))
        for axis in points:
            if not set(axis) & set(case):
                gains = [len(met_first([*case, point])) for point in axis]
                case.append(axis[gains.index(max(gains))])
        for pair in met_first(case):
            del missing[pair]
        cases.append(tuple(value for _, value in sorted(case)))
    return cases


def test_any_two_values_meet_in_some_case() -> None:
    cases = covering(AXES)
    for one, other in itertools.combinations(range(len(AXES)), 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(AXES[one], AXES[other]))


def test_the_branch_is_used_by_no_rank_by_some_and_by_all() -> None:
    batch_of = PROBLEMS["branches"].batch_of
    gates = [[Branches.gate(batch_of(step, rank)[0]) for rank in range(2)] for step in range(STEPS)]
    assert {sum(of_step) for of_step in gates} == {0, 1, 2}


# --- bit for bit ----------------------------------------------------------------------------------


def alone(
    model: str,
    dtype: torch.dtype | None,
    hosts: Sequence[Sequence[int]],
    optimizer: str,
    accumulation: str,
) -> nn.Module:
    """The reference, which must have learnt something."""
    problem = PROBLEMS[model]
    options = ACCUMULATIONS[accumulation]
    trained = train_alone(
        problem.model(dtype),
        OPTIMIZERS[optimizer],
        problem.loss,
        sum(map(len, hosts)),
        STEPS,
        hosts=hosts,
        passes=options.get("passes", 1),
        average_passes=options.get("average_accumulated", False),
    )
    for (name, param), start in zip(
        trained.named_parameters(), problem.model(dtype).parameters(), strict=True
    ):
        assert param.isfinite().all(), name
        assert torch.equal(param, start) == name.startswith("never."), name
    return trained


def check_loopback(
    model: str,
    dtype: torch.dtype | None,
    layout: str,
    optimizer: str,
    bucket_cap: str,
    accumulation: str,
) -> None:
    hosts = [int(host) for host in layout]
    problem = PROBLEMS[model]
    trained = train_on_ranks(
        problem.model(dtype),
        OPTIMIZERS[optimizer],
        problem.loss,
        len(hosts),
        STEPS,
        hosts=hosts,
        bucket_cap_bytes=BUCKET_CAPS[bucket_cap],
        **ACCUMULATIONS[accumulation],
    )
    expected = alone(model, dtype, ranks_by_host(hosts), optimizer, accumulation)
    assert_same_parameters(trained, expected)


@pytest.mark.parametrize(
    ("model", "dtype", "layout", "optimizer", "bucket_cap", "accumulation"),
    [pytest.param(*case, id="-".join(case)) for case in covering(AXES)],
)
def test_ranks_equal_one_process(
    model: str, dtype: str, layout: str, optimizer: str, bucket_cap: str, accumulation: str
) -> None:
    check_loopback(model, DTYPES[dtype], layout, optimizer, bucket_cap, accumulation)


@pytest.mark.parametrize(
    ("layout", "optimizer", "bucket_cap", "accumulation"),
    [
        ("00", "adamw", "default", "no_sync"),
        ("012", "lbfgs", "KiB", "one_pass"),
        ("0011", "sgd", "each_its_own_bucket", "averaged"),
    ],
)
def test_several_dtypes_in_one_model(
    layout: str, optimizer: str, bucket_cap: str, accumulation: str
) -> None:
    check_loopback("several_dtypes", None, layout, optimizer, bucket_cap, accumulation)


@pytest.mark.parametrize(
    ("dtype", "layout", "optimizer", "bucket_cap", "accumulation"),
    [
        ("float64", "00", "sgd", "each_its_own_bucket", "one_pass"),
        ("float32", "0011", "adamw", "KiB", "passes"),
        ("bfloat16", "012", "sgd", "default", "averaged"),
        ("float16", "000", "adamw", "each_its_own_bucket", "no_sync"),
    ],
)
def test_channels_last(
    dtype: str, layout: str, optimizer: str, bucket_cap: str, accumulation: str
) -> None:
    """Not among the models above because LBFGS takes contiguous gradients only."""
    check_loopback("channels_last", DTYPES[dtype], layout, optimizer, bucket_cap, accumulation)


@settings(max_examples=60)
@given(
    layout=st.sampled_from(LAYOUTS),
    counts_and_dtypes=st.lists(
        st.tuples(st.integers(0, 300), st.sampled_from(sorted(DTYPES))), min_size=1, max_size=8
    ),
    bucket_cap_bytes=st.integers(1, 3000),
    overlap=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_gradients_in_any_buckets_are_the_canonical_fold(
    layout: str,
    counts_and_dtypes: list[tuple[int, str]],
    bucket_cap_bytes: int,
    overlap: bool,
    seed: int,
) -> None:
    hosts = [int(host) for host in layout]
    generator = torch.Generator().manual_seed(seed)
    by_rank = [
        [torch.randn(n, generator=generator).to(DTYPES[dtype]) for n, dtype in counts_and_dtypes]
        for _ in hosts
    ]

    def reduced(group: _core.Group) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros_like(grad)) for grad in by_rank[group.rank]]
        optimizer = DistributedOptimizer(
            torch.optim.SGD(params),
            group=group,
            bucket_cap_bytes=bucket_cap_bytes,
            overlap=overlap,
        )
        for _ in range(2):  # the first pass lays out the buckets
            optimizer.zero_grad()
            torch.autograd.backward(params, [grad.clone() for grad in by_rank[group.rank]])
        return [param.grad for param in params]

    expected = [
        fold(grads, len(hosts), ranks_by_host(hosts)) for grads in zip(*by_rank, strict=True)
    ]
    for grads in run_ranks(len(hosts), reduced, hosts=hosts):
        for grad, reference in zip(grads, expected, strict=True):
            assert torch.equal(bits(grad), bits(reference))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "dtype", "optimizer", "bucket_cap", "accumulation"),
    [
        ("branches", "bfloat16", "sgd", "KiB", "passes"),
        ("convolution", "float64", "lbfgs", "each_its_own_bucket", "one_pass"),
        ("transformer", "float32", "adamw", "default", "no_sync"),
    ],
)
def test_processes_equal_one_process(
    model: str, dtype: str, optimizer: str, bucket_cap: str, accumulation: str
) -> None:
    pycomm.init()
    group = world_group()
    problem = PROBLEMS[model]
    trained = train_as_rank(
        group,
        problem.model(DTYPES[dtype]),
        OPTIMIZERS[optimizer],
        problem.loss,
        STEPS,
        bucket_cap_bytes=BUCKET_CAPS[bucket_cap],
        **ACCUMULATIONS[accumulation],
    )
    expected = alone(model, DTYPES[dtype], group.hosts, optimizer, accumulation)
    assert_same_parameters([trained], expected)


# --- within rounding ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("model", ["convolution", "transformer", "tied"])
def test_sgd_in_float64_stays_near_the_concatenated_batch(model: str, world_size: int) -> None:
    """Equally large shards: the mean of their means is the mean of all, but for the rounding.

    A gradient element is a mean whose sum has at most n = 576 terms (the first convolution's: 4
    ranks x 4 images x 36 positions), of size 1 at most. Added up in whatever order, its rounding
    error is at most n u with u = 2^-53, so two orders differ by delta <= 2 n u = 1.3e-13. In 20
    steps with lr = 0.01 and momentum m = 0.9 the parameters come to differ by

        sum over t = 1..20 of  lr (1 - m^t) / (1 - m) delta  =  1.2 delta  =  1.6e-13

    which leaves a factor of 6 for what differing parameters add to the gradients of later steps.
    """
    problem = PROBLEMS[model]

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def loss_of_all(model: nn.Module, number: int, _: int) -> Tensor:
        shards = [problem.batch_of(number, rank) for rank in range(world_size)]
        return problem.loss_on(model, *map(torch.cat, zip(*shards, strict=True)))

    def start() -> nn.Module:
        return problem.model(torch.float64)

    expected = train_alone(start(), sgd, loss_of_all, 1, STEPS)
    for trained in train_on_ranks(start(), sgd, problem.loss, world_size, STEPS):
        for (name, ours), reference in zip(
            trained.named_parameters(), expected.parameters(), strict=True
        ):
            assert (ours - reference).abs().max() <= 1e-12, name
