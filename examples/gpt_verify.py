"""One process repeats what the ranks of train_gpt.py did together. It knows of no pipeline."""

import argparse

import gpt
import torch
from text import Text
from torch import Tensor, nn
from verify import canonical_average

import pycomm
from pycomm.pipeline import Pipeline
from pycomm.tensor_parallel import whole_state_dict


def largest_difference(
    pipeline: Pipeline,
    shape: gpt.Shape,
    text: Text,
    mesh: pycomm.Mesh,
    args: argparse.Namespace,
    learning_rate: float,
) -> float:
    """Of any rank's parameters from those of a model that rank 0 trains from the start.

    Returns:
        The largest absolute difference, on rank 0. 0 if all are equal; ranks that split layers
        round their sums differently.
    """
    everyones = pycomm.gather_object(whole_state_dict(pipeline.module))
    if everyones is None:
        return 0.0
    model = gpt.build(shape, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(args.steps):
        batch = text.batch(step, args.batch)
        replicas = zip(*(part.tensor_split(args.dp) for part in batch), strict=True)
        of_replicas = [_gradients(model, x, y, args.micro_batches) for x, y in replicas]
        for param, *gradients in zip(model.parameters(), *of_replicas, strict=True):
            param.grad = canonical_average(gradients, mesh["dp"].hosts)
        optimizer.step()
    expected = model.state_dict()
    assert set().union(*everyones) == set(expected)
    differences = [
        (value - expected[name]).abs().max() for state in everyones for name, value in state.items()
    ]
    return float(torch.stack(differences).max())


def _gradients(
    model: nn.Module, x: Tensor, y: Tensor, micro_batches: int
) -> tuple[Tensor | None, ...]:
    """Of the mean loss of all rows, which pass in parts."""
    model.zero_grad()
    parts = zip(x.tensor_split(micro_batches), y.tensor_split(micro_batches), strict=True)
    for x_part, y_part in parts:
        loss = gpt.loss(model(x_part), y_part, None)
        if micro_batches > 1:
            loss = loss * (len(x_part) / len(x))
        loss.backward()  # type: ignore[no-untyped-call]
    return tuple(param.grad for param in model.parameters())
