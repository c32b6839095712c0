"""ZeRO-1: sharing out the optimizer's state changes no bit of the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import fold
from run_ranks import RankError, run_ranks
from torch import Tensor, nn

from pycomm import (
    DistributedOptimizer,
    GradScaler,
    InvalidArgumentError,
    ShardedOptimizer,
    _core,
)

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "foreach": False}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "centered": True}),
}


class Model(nn.Module):
    """Parameters of 1, 70, 350, ... elements, one transposed in memory, one that is seldom used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(5, 70)
        self.second = nn.Linear(70, 3)
        self.second.weight = nn.Parameter(self.second.weight.detach().t().contiguous().t())
        self.seldom = nn.Linear(3, 3, bias=False)
        self.never = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, seldom: bool = False) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x * self.scale)))
        return self.seldom(y) if seldom else y


TEMPLATE = Model()


def model(dtype: torch.dtype = torch.float64) -> Model:
    """The same each time, in every thread."""
    return copy.deepcopy(TEMPLATE).to(dtype)


def batch(step: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (
        torch.randn(4, 5, generator=generator).to(dtype),
        torch.randn(4, 3, generator=generator).to(dtype),
    )


def loss_of(replica: Model, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank, replica.scale.dtype)
    return nn.functional.mse_loss(replica(x, seldom=step % 3 == 1 and rank == 0), y)


def gradients(replica: Model, step: int, rank: int) -> list[Tensor | None]:
    replica.zero_grad()
    loss_of(replica, step, rank).backward()
    return [param.grad for param in replica.parameters()]


def step_alone(
    replica: Model, optimizer: torch.optim.Optimizer, step: int, ranks: int, clip: float | None
) -> None:
    of_ranks = [gradients(replica, step, rank) for rank in range(ranks)]
    for param, *own in zip(replica.parameters(), *of_ranks, strict=True):
        param.grad = fold(own, ranks)
    if clip is not None:
        nn.utils.clip_grad_norm_(replica.parameters(), clip)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("hosts", [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]])
def test_ten_steps_end_with_the_bits_of_the_canonical_fold(
    hosts: list[int], name: str, dtype: torch.dtype
) -> None:
    optimizer_class, options = OPTIMIZERS[name]

    def run(group: _core.Group) -> list[Tensor]:
        replica = model(dtype)
        optimizer = ShardedOptimizer(optimizer_class, replica.parameters(), group=group, **options)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(replica, step, group.rank).backward()
            optimizer.step()
        return list(replica.parameters())

    results = run_ranks(len(hosts), run, hosts=hosts)
    alone = model(dtype)
    optimizer = optimizer_class(alone.parameters(), **options)
    for step in range(10):
        step_alone(alone, optimizer, step, len(hosts), None)
    for rank, params in enumerate(results):
        for (which, expected), param in zip(alone.named_parameters(), params, strict=True):
            assert torch.equal(param, expected), f"{which} on rank {rank}"


def groups_of(replica: Model) -> list[dict[str, Any]]:
    return [
        {"params": [replica.scale, *replica.first.parameters()], "lr": 0.05},
        {"params": [*replica.second.parameters(), replica.seldom.weight], "weight_decay": 0.1},
        {"params": [replica.never]},
    ]


def test_param_groups_schedulers_accumulation_and_clipping() -> None:
    """The norm of pieces rounds differently from that of tensors: 1e-12 of numbers around 1."""

    def train(
        replica: Model,
        optimizer: torch.optim.Optimizer,
        take: Callable[[torch.optim.Optimizer, int], None],
    ) -> list[Tensor]:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for step in range(6):
            take(optimizer, step)
            scheduler.step()
        return list(replica.parameters())

    def run(group: _core.Group) -> list[Tensor]:
        replica = model()

        def take(optimizer: torch.optim.Optimizer, step: int) -> None:
            optimizer.zero_grad()
            loss_of(replica, 2 * step, group.rank).backward()
            loss_of(replica, 2 * step + 1, group.rank).backward()
            assert isinstance(optimizer, ShardedOptimizer)
            optimizer.clip_grad_norm_(0.05)
            optimizer.step()

        optimizer = ShardedOptimizer(torch.optim.AdamW, groups_of(replica), lr=0.01, group=group)
        return train(replica, optimizer, take)

    results = run_ranks(3, run)
    alone = model()

    def take(optimizer: torch.optim.Optimizer, step: int) -> None:
        sums: list[list[Tensor | None]] = []
        for rank in range(3):
            alone.zero_grad()
            loss_of(alone, 2 * step, rank).backward()
            loss_of(alone, 2 * step + 1, rank).backward()
            sums.append([param.grad for param in alone.parameters()])
        for param, *own in zip(alone.parameters(), *sums, strict=True):
            param.grad = fold(own, 3)
        nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        optimizer.step()

    expected = train(alone, torch.optim.AdamW(groups_of(alone), lr=0.01), take)
    for params in results:
        for param, other in zip(params, expected, strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=1e-12)


def test_each_rank_keeps_its_share_of_the_state() -> None:
    """All of them together keep what one process would, and none more than its part of that."""

    def run(group: _core.Group) -> int:
        replica = nn.Sequential(nn.Linear(99, 300), nn.Linear(300, 7))
        optimizer = ShardedOptimizer(torch.optim.Adam, replica.parameters(), group=group)
        replica(torch.ones(2, 99)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()["inner"]["state"]
        return sum(t.nbytes for of in state.values() for t in of.values() if t.dim() > 0)

    elements = 99 * 300 + 300 + 300 * 7 + 7
    for ranks in (1, 2, 3, 4):
        kept = run_ranks(ranks, run)
        assert sum(kept) == 2 * 4 * elements
        assert max(kept) <= 2 * 4 * (elements / ranks + 4 * 128), (ranks, kept)


def test_a_state_goes_from_four_ranks_to_two_and_to_a_bare_optimizer() -> None:
    def run(
        group: _core.Group, start: dict[str, Any] | None, weights: Any, steps: range
    ) -> tuple[dict[str, Any], Any]:
        replica = model()
        replica.load_state_dict(weights)
        optimizer = ShardedOptimizer(
            torch.optim.AdamW, replica.parameters(), group=group, lr=0.5 if start else 0.01
        )
        if start is not None:
            optimizer.load_full_state_dict(start)
        for step in steps:
            optimizer.zero_grad()
            loss_of(replica, step, 0).backward()  # the same on every rank: their mean is that
            optimizer.step()
        return optimizer.full_state_dict(), copy.deepcopy(replica.state_dict())

    weights = model().state_dict()
    saved, halfway = run_ranks(4, lambda group: run(group, None, weights, range(4)))[3]
    _, end = run_ranks(2, lambda group: run(group, saved, halfway, range(4, 8)))[0]
    alone = model()
    bare = torch.optim.AdamW(alone.parameters(), lr=0.01)
    alone.load_state_dict(halfway)
    bare.load_state_dict(saved)
    for step in range(4, 8):
        bare.zero_grad()
        loss_of(alone, step, 0).backward()
        bare.step()
    for name, value in alone.state_dict().items():
        assert torch.equal(value, end[name]), name
    whole = bare.state_dict()
    assert whole["param_groups"] == saved["param_groups"]


def test_a_scaler_skips_a_step_on_every_rank() -> None:
    def run(group: _core.Group) -> list[list[Tensor]]:
        replica = model(torch.float32)
        optimizer = ShardedOptimizer(torch.optim.SGD, replica.parameters(), lr=0.1, group=group)
        scaler = GradScaler("cpu", init_scale=256.0, group=group)
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of(replica, step, group.rank)
            if step == 1 and group.rank == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append([param.detach().clone() for param in replica.parameters()])
        assert scaler.get_scale() == 128.0
        return seen

    for seen in run_ranks(2, run):
        assert all(map(torch.equal, seen[0], seen[1]))
        assert not all(map(torch.equal, seen[1], seen[2]))


def refused(make: Callable[[_core.Group], Any], kind: type[Exception], pattern: str) -> None:
    def attempt(group: _core.Group) -> None:
        with pytest.raises(kind, match=pattern):
            make(group)
        group.barrier()

    run_ranks(2, attempt)


def test_what_cannot_be_divided_is_refused() -> None:
    def params() -> list[nn.Parameter]:
        return list(model().parameters())

    refused(
        lambda group: ShardedOptimizer(torch.optim.LBFGS, params(), group=group),
        InvalidArgumentError,
        r"cannot divide LBFGS(.|\n)*DistributedOptimizer",
    )
    bare = torch.optim.SGD(params(), lr=0.1)
    refused(
        lambda group: ShardedOptimizer(bare, params(), group=group),  # type: ignore[arg-type]
        TypeError,
        "takes the class of an optimizer",
    )

    def both(group: _core.Group) -> None:
        own = params()
        first = ShardedOptimizer(torch.optim.SGD, own, lr=0.1, group=group)
        with pytest.raises(InvalidArgumentError, match=r"add_param_group(.|\n)*dealt out"):
            first.add_param_group({"params": params()})
        with pytest.raises(TypeError, match="cannot be pickled"):
            copy.deepcopy(first)
        DistributedOptimizer(torch.optim.SGD(own, lr=0.1), group=group)

    refused(both, InvalidArgumentError, "already belongs to another")


def test_a_model_that_was_moved_is_refused() -> None:
    def step(group: _core.Group) -> None:
        replica = model()
        optimizer = ShardedOptimizer(torch.optim.SGD, replica.parameters(), lr=0.1, group=group)
        replica.to(torch.float32).to(torch.float64)
        loss_of(replica, 1, 0).backward()
        optimizer.step()

    refused(step, InvalidArgumentError, r"has got other memory(.|\n)*model.to\(\)")


def test_a_share_is_loaded_where_it_belongs() -> None:
    states = run_ranks(
        2,
        lambda group: ShardedOptimizer(
            torch.optim.SGD, model().parameters(), lr=0.1, group=group
        ).state_dict(),
    )

    def load(group: _core.Group) -> None:
        optimizer = ShardedOptimizer(torch.optim.SGD, model().parameters(), lr=0.2, group=group)
        optimizer.load_state_dict(states[group.rank])
        assert optimizer.param_groups[0]["lr"] == 0.1
        optimizer.load_state_dict(states[1 - group.rank])

    with pytest.raises(RankError, match=r"the state is that of(.|\n)*full_state_dict"):
        run_ranks(2, load)


def test_ranks_with_other_models_hear_of_it() -> None:
    def run(group: _core.Group) -> None:
        width = 3 + group.rank
        ShardedOptimizer(torch.optim.SGD, nn.Linear(3, width).parameters(), lr=0.1, group=group)

    with pytest.raises(RankError, match=r"MismatchError: ShardedOptimizer: ranks have different"):
        run_ranks(2, run)
