"""Pipelines over real processes: as under mpirun, each rank with a random state of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from test_pipeline import SCHEDULES, assert_equal_parts, batches, block_model, sgd, trained_alone
from torch import Tensor, nn

import pycomm
from pycomm.pipeline import Pipeline

mse = nn.functional.mse_loss


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_processes_end_with_the_parameters_of_one_process(schedule: str) -> None:
    pycomm.init()
    model, data = block_model(), batches(8, 4)
    pipeline = Pipeline(copy.deepcopy(model), mse, schedule=schedule, micro_batches=7)
    optimizer = sgd(pipeline.parameters())
    for x, y in data:
        optimizer.zero_grad()
        pipeline.step(x, y)
        optimizer.step()
    expected, _ = trained_alone(model, data, 7)
    parts = pycomm.all_gather_object(dict(pipeline.named_parameters()))
    assert_equal_parts(parts, expected)


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dropout_drops_the_same_in_recomputation(schedule: str) -> None:
    pycomm.init()
    model, (x, y) = block_model(), batches(8, 1)[0]
    layers = [nn.Sequential(layer, nn.Dropout(0.3)) for layer in model]

    def gradients(recompute: bool) -> tuple[list[Tensor], Tensor]:
        pipeline = Pipeline(
            nn.Sequential(*copy.deepcopy(layers)),
            mse,
            schedule=schedule,
            micro_batches=4,
            recompute=recompute,
        )
        torch.manual_seed(17 + pycomm.rank())
        loss = pipeline.step(x, y)
        found = [param.grad for param in pipeline.parameters()]
        assert all(gradient is not None for gradient in found)
        return [gradient for gradient in found if gradient is not None], loss

    kept, loss = gradients(recompute=False)
    recomputed, its_loss = gradients(recompute=True)
    assert torch.equal(loss, its_loss)
    assert all(map(torch.equal, kept, recomputed))
