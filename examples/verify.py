"""One process repeats what the ranks did together, to the last bit."""

import functools

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

import pycomm


def largest_difference(
    trained: nn.Module,
    replica: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    loaders: list[DataLoader[tuple[Tensor, ...]]],
    epochs: int,
) -> float:
    """Train ``replica`` from the start and compare it with ``trained``.

    Args:
        loaders: the batches of each rank.

    Returns:
        The largest absolute difference between two parameters; 0 if they are equal.
    """
    for epoch in range(epochs):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batches in zip(*loaders, strict=True):
            of_ranks = [_gradients(replica, images, labels) for images, labels in batches]
            for param, *gradients in zip(replica.parameters(), *of_ranks, strict=True):
                param.grad = canonical_average(gradients, pycomm.hosts())
            optimizer.step()
        schedule.step()
    pairs = zip(trained.parameters(), replica.parameters(), strict=True)
    return max((a - b).detach().abs().max().item() for a, b in pairs)


def canonical_average(gradients: list[Tensor], hosts: list[list[int]]) -> Tensor:
    """Fold the ranks of a host by rank, then the hosts in order; divide once, at the end."""
    of_hosts = [functools.reduce(torch.add, [gradients[rank] for rank in host]) for host in hosts]
    return functools.reduce(torch.add, of_hosts) / len(gradients)


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    loss = nn.functional.cross_entropy(model(images), labels)
    return torch.autograd.grad(loss, list(model.parameters()))
