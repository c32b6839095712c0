"""Layers split over ranks train as whole ones do: a split sum rounds differently, and no more."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import split_transformer as transformer
import torch
from parity import fold
from run_ranks import run_ranks
from split_transformer import batch, split, split_loss, whole, whole_loss
from torch import Tensor, nn

from pycomm import (
    DistributedOptimizer,
    ShardedOptimizer,
    _core,
    broadcast_parameters,
    clip_grad_norm_,
)
from pycomm.mesh import Mesh
from pycomm.pipeline import Pipeline
from pycomm.tensor_parallel import whole_state_dict

STEPS = 10
RATE = 0.05
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


def assert_close_state(state: dict[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def trained_alone(
    model: nn.Sequential, replicas: int = 1, micro_batches: int = 1, max_norm: float | None = None
) -> nn.Sequential:
    """One process that folds the gradients of data-parallel replicas."""
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        gradients: list[list[Tensor | None]] = []
        for replica in range(replicas):
            optimizer.zero_grad()
            x, y = batch(step, replica)
            for x_part, y_part in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                (whole_loss(model(x_part), y_part) / micro_batches).backward()
            gradients.append([param.grad for param in model.parameters()])
        for param, of_replicas in zip(
            model.parameters(), zip(*gradients, strict=True), strict=True
        ):
            param.grad = fold(of_replicas, replicas)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_split_transformer_trains_as_a_whole_one(ranks: int, sequence: bool) -> None:
    model = whole()
    assert transformer.VOCABULARY % 2 == 1  # shares differ

    def run(group: _core.Group) -> dict[str, Tensor]:
        mine = split(copy.deepcopy(model), group, sequence=sequence)
        optimizer = sgd(mine.parameters())
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            split_loss(mine(x), y, group).backward()
            optimizer.step()
        return whole_state_dict(mine)

    states = run_ranks(ranks, run)
    expected = trained_alone(copy.deepcopy(model))
    for state in states:
        assert_close_state(state, expected)
        for name, value in state.items():  # what all ranks have is the same on all
            assert torch.equal(value, states[0][name]), name


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("make", ["distributed", "sharded"])
def test_with_data_parallelism(make: str, sequence: bool) -> None:
    model = whole()

    def run(group: _core.Group) -> dict[str, Tensor]:
        mesh = Mesh({"dp": 2, "tp": 2}, group=group)
        mine = split(copy.deepcopy(model), mesh["tp"], sequence=sequence)
        optimizer: torch.optim.Optimizer
        if make == "distributed":
            optimizer = DistributedOptimizer(
                sgd(mine.parameters()), mine.named_parameters(), group=mesh["dp"]
            )
        else:
            optimizer = ShardedOptimizer(
                torch.optim.SGD, mine.parameters(), lr=RATE, momentum=0.9, group=mesh["dp"]
            )
        broadcast_parameters(mine, group=mesh["dp"])
        broadcast_parameters(mine, group=mesh["tp"])
        for step in range(STEPS):
            x, y = batch(step, mesh.coordinate["dp"])
            optimizer.zero_grad()
            split_loss(mine(x), y, mesh["tp"]).backward()
            if isinstance(optimizer, ShardedOptimizer):
                optimizer.clip_grad_norm_(0.5, model=mine)
            else:
                clip_grad_norm_(mine, 0.5, group=mesh["tp"])
            optimizer.step()
        return whole_state_dict(mine)

    expected = trained_alone(copy.deepcopy(model), replicas=2, max_norm=0.5)
    for state in run_ranks(4, run):
        assert_close_state(state, expected)


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_in_a_pipeline(schedule: str, sequence: bool) -> None:
    model = whole(layers=4)

    def run(group: _core.Group) -> list[dict[str, Tensor]]:
        mesh = Mesh({"pp": 2, "tp": 2}, group=group)
        mine = split(copy.deepcopy(model), mesh["tp"], sequence=sequence)
        pipeline = Pipeline(
            mine,
            functools.partial(split_loss, group=mesh["tp"]),
            schedule=schedule,
            micro_batches=3,
            group=mesh["pp"],
        )
        optimizer = sgd(pipeline.parameters())
        for step in range(STEPS):
            optimizer.zero_grad()
            pipeline.step(*batch(step))
            pipeline.clip_grad_norm_(0.5)
            optimizer.step()
        return [whole_state_dict(pipeline.module)]

    expected = trained_alone(copy.deepcopy(model), micro_batches=3, max_norm=0.5).state_dict()
    names = set()
    for (state,) in run_ranks(4, run):
        names |= set(state)
        for name, value in state.items():
            close(value, expected[name])
    assert names == set(expected)
