"""What the ranks' training must equal, bit for bit: one process that does their work in turn."""

import copy
from collections.abc import Callable, Sequence

import torch
from run_ranks import run_ranks
from torch import Tensor, nn

from pycomm import _core
from pycomm.optimizer import DistributedOptimizer

Loss = Callable[[nn.Module, int, int], Tensor]
"""loss(model, step, rank)"""
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def fold(grads: Sequence[Tensor | None], divisor: int) -> Tensor | None:
    """The canonical reduction: in rank order, in the accumulator, divided and rounded once."""
    used = next((grad for grad in grads if grad is not None), None)
    if used is None:
        return None
    wide = torch.float32 if used.dtype in (torch.float16, torch.bfloat16) else used.dtype
    total = torch.zeros_like(used, dtype=wide) if grads[0] is None else grads[0].to(wide)
    for grad in grads[1:]:
        total = total + (torch.zeros_like(total) if grad is None else grad.to(wide))
    if total.is_complex():  # the core divides the two parts
        return torch.view_as_complex(torch.view_as_real(total) / divisor)
    return (total / divisor).to(used.dtype)


def train_alone(
    model: nn.Module, make_optimizer: MakeOptimizer, loss: Loss, world_size: int, steps: int
) -> nn.Module:
    """Compute the ranks' gradients one after the other, fold them, step."""
    optimizer = make_optimizer(model)
    for step in range(steps):
        by_rank = []
        for rank in range(world_size):
            model.zero_grad()
            loss(model, step, rank).backward()
            by_rank.append([param.grad for param in model.parameters()])
        for param, grads in zip(model.parameters(), zip(*by_rank, strict=True), strict=True):
            param.grad = fold(grads, world_size)
        optimizer.step()
    return model


def train_on_ranks(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    loss: Loss,
    world_size: int,
    steps: int,
    hosts: Sequence[int] | None = None,
    **options: object,
) -> list[nn.Module]:
    # Copied here: drawing weights in the ranks' threads would mix up the random generator.
    replicas = [copy.deepcopy(model) for _ in range(world_size)]

    def train(group: _core.Group) -> nn.Module:
        replica = replicas[group.rank]
        optimizer = DistributedOptimizer(
            make_optimizer(replica), replica.named_parameters(), group=group, **options
        )
        for step in range(steps):
            optimizer.zero_grad()
            loss(replica, step, group.rank).backward()
            optimizer.step()
        return replica

    return run_ranks(world_size, train, hosts=hosts)


def assert_same_parameters(models: Sequence[nn.Module], expected: nn.Module) -> None:
    for rank, model in enumerate(models):
        for (name, param), reference in zip(
            model.named_parameters(), expected.parameters(), strict=True
        ):
            assert torch.equal(param, reference), f"{name} on rank {rank} of {len(models)}"
