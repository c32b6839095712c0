"""What the ranks' training must equal, bit for bit: one process that does their work in turn."""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence

import torch
from run_ranks import run_ranks
from torch import Tensor, nn

from pycomm import _core
from pycomm.optimizer import DistributedOptimizer

Loss = Callable[[nn.Module, int, int], Tensor]
"""loss(model, number, rank): of a rank's ``number``-th batch; each backward pass takes the next."""
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def ranks_by_host(hosts: Sequence[int]) -> list[list[int]]:
    """The ranks of each host, given the host of each rank; hosts in the order of their first."""
    return [[rank for rank, h in enumerate(hosts) if h == host] for host in dict.fromkeys(hosts)]


def fold(
    grads: Sequence[Tensor | None], divisor: int, hosts: Sequence[Sequence[int]] | None = None
) -> Tensor | None:
    """The canonical reduction, in the accumulator, divided and rounded once.

    Args:
        grads: of each rank; None counts as zero, unless all are.
        hosts: the ranks of each host: folded in this order, then the hosts' sums. One if None.
    """
    used = next((grad for grad in grads if grad is not None), None)
    if used is None:
        return None
    wide = torch.float32 if used.dtype in (torch.float16, torch.bfloat16) else used.dtype
    addends = [torch.zeros_like(used) if grad is None else grad for grad in grads]
    of_hosts = [
        functools.reduce(torch.add, [addends[rank].to(wide) for rank in host])
        for host in hosts or [range(len(grads))]
    ]
    total = functools.reduce(torch.add, of_hosts)
    if total.is_complex():  # the core divides the two parts
        return torch.view_as_complex(torch.view_as_real(total) / divisor)
    return (total / divisor).to(used.dtype)


def take_step(
    optimizer: torch.optim.Optimizer, evaluate: Callable[[], Tensor], *, closure: bool
) -> None:
    """``evaluate`` computes gradients and loss; some optimizers want to call it themselves."""
    if closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


def wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.LBFGS)


def train_alone(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    loss: Loss,
    world_size: int,
    steps: int,
    *,
    hosts: Sequence[Sequence[int]] | None = None,
    passes: int = 1,
    average_passes: bool = False,
) -> nn.Module:
    """Compute the ranks' gradients one after the other, fold them, step.

    Knows nothing of pycomm.

    Args:
        hosts: as for ``fold``.
        passes: backward passes a step, which autograd adds up.
    """
    optimizer = make_optimizer(model)
    divisor = world_size * passes if average_passes else world_size

    def evaluate(step: int) -> Tensor:
        by_rank, losses = [], []
        for rank in range(world_size):
            model.zero_grad()
            values = []
            for number in range(step * passes, (step + 1) * passes):
                values.append(loss(model, number, rank))
                values[-1].backward()
            by_rank.append([param.grad for param in model.parameters()])
            losses.append(sum(values).detach())
        for param, grads in zip(model.parameters(), zip(*by_rank, strict=True), strict=True):
            param.grad = fold(grads, divisor, hosts)
        return fold(losses, world_size, hosts)

    for step in range(steps):
        closure = wants_closure(optimizer)
        take_step(optimizer, functools.partial(evaluate, step), closure=closure)
    return model


def train_as_rank(
    group: _core.Group,
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    loss: Loss,
    steps: int,
    *,
    passes: int = 1,
    no_sync: bool = False,
    **options: object,
) -> nn.Module:
    """What a user's training loop does.

    Args:
        passes: backward passes a step.
        no_sync: all of them but the last are made in ``no_sync()``.
        options: of ``DistributedOptimizer``.
    """
    bare = make_optimizer(model)
    optimizer = DistributedOptimizer(bare, model.named_parameters(), group=group, **options)

    def evaluate(step: int) -> Tensor:
        optimizer.zero_grad()
        values = []
        for number in range(step * passes, (step + 1) * passes):
            silent = no_sync and (number + 1) % passes != 0
            with optimizer.no_sync() if silent else contextlib.nullcontext():
                values.append(loss(model, number, group.rank))
                values[-1].backward()
        return sum(values).detach()

    for step in range(steps):
        take_step(optimizer, functools.partial(evaluate, step), closure=wants_closure(bare))
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
    """``train_as_rank`` on copies of the model; ``hosts`` as for ``run_ranks``."""
    # Copied here: drawing weights in the ranks' threads would mix up the random generator.
    replicas = [copy.deepcopy(model) for _ in range(world_size)]
    return run_ranks(
        world_size,
        lambda group: train_as_rank(
            group, replicas[group.rank], make_optimizer, loss, steps, **options
        ),
        hosts=hosts,
    )


def bits(t: Tensor) -> Tensor:
    """Tells +0 from -0, and finds a NaN equal to itself."""
    return t.detach().contiguous().flatten().view(torch.uint8)


def assert_same_parameters(models: Sequence[nn.Module], expected: nn.Module) -> None:
    for rank, model in enumerate(models):
        for (name, param), reference in zip(
            model.named_parameters(), expected.parameters(), strict=True
        ):
            assert param.dtype is reference.dtype and param.shape == reference.shape
            assert torch.equal(bits(param), bits(reference)), f"{name} on rank {rank}"
