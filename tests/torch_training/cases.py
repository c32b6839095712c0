"""What a training case is, and what the cases have in common: models, data, the training loop.

A case is a function that trains, or moves tensors, on the default process group, whatever backend
that has, and returns what is to be compared: losses, parameters, tensors. It is run on gloo and on
pycomm, with the same seeds, in the same processes.

How they are compared. Pycomm folds the numbers of all ranks in rank order; where gloo starts
depends on the element and on the algorithm it takes. A sum of two numbers, and of two numbers and
zeros, has the same bits in any order, and a division by 2 or 4 rounds nothing. So

- on 2 ranks every case has to give the same bits, and
- on 4 ranks too where the ranks take turns: two of them are at work in every step, and the loss of
  the others is multiplied by zero (``share``). All ranks do all the communication.

On 4 ranks the cases with ``compared=ROUNDING`` add up four numbers that are not zero (partial
results of split layers, norms of gradients, statistics), and results differ by rounding:

    A sum of p numbers g_i, whatever its order, is off by at most (p-1) u sum|g_i|; u is 2^-24 for
    float32, 2^-8 for bfloat16 (Higham, Accuracy and Stability, 4.2). So two orders differ by at
    most 2 (p-1) u sum|g_i|. A step of gradient descent that does not expand differences (its rate
    is below 2/L on these models: they converge) adds one such difference to those of the steps
    before: after s steps, at most 2 s (p-1) u sum|g_i|, plus as much again for the rounding of the
    forward and backward computations that start from different parameters.

With s = 20 and p = 4 that is 240 u of the largest number compared: 1.4e-5 for float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

STEPS = 20
SEED = 7

BITS = "bits"
ROUNDING = "rounding"


@dataclasses.dataclass(frozen=True)
class Case:
    """A case and where it belongs.

    Attributes:
        run: returns a tree of tensors and plain values.
        world_sizes: on which it makes sense.
        in_ci: those of them that CI runs; `make test-torch-training` runs all.
        compared: BITS or ROUNDING, on 4 ranks; on 2 it is BITS.
        refused: what is in the message of the error that torch raises, on gloo as on pycomm; empty
            for what works.
    """

    name: str
    run: Callable[[], Any]
    world_sizes: tuple[int, ...]
    in_ci: tuple[int, ...]
    compared: str
    refused: str

    @property
    def summary(self) -> str:
        """What it runs."""
        return " ".join((self.run.__doc__ or "").split()).rstrip(".")


CASES: dict[str, Case] = {}


def case(
    *,
    world_sizes: tuple[int, ...] = (2, 4),
    in_ci: tuple[int, ...] = (2, 4),
    compared: str = BITS,
    refused: str = "",
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(run: Callable[[], Any]) -> Callable[[], Any]:
        name = run.__name__
        assert name not in CASES, f"two cases are called {name}"
        CASES[name] = Case(name, run, world_sizes, in_ci, compared, refused)
        return run

    return register


def share(step: int) -> float:
    """1 on the two ranks whose turn it is, 0 on the others."""
    return 1.0 if (dist.get_rank() - step) % dist.get_world_size() < 2 else 0.0


class Network(nn.Module):
    """Layers with sizes that no world size divides, a norm, and a residual."""

    def __init__(self, width: int = 17, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(8, width, dtype=dtype)
        self.middle = nn.Sequential(
            nn.Linear(width, 2 * width, dtype=dtype),
            nn.GELU(),
            nn.Linear(2 * width, width, dtype=dtype),
        )
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.last = nn.Linear(width, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = h + self.middle(h)
        return self.last(self.norm(h))


def seeded(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """The same module on every rank and every backend."""
    torch.manual_seed(SEED)
    return make(*args, **kwargs)


def batch(step: int, rank: int | None = None, rows: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs (rows, 8) and what to learn from them (rows, 3); of this rank if None."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(rows, 8, generator=generator)
    return x, torch.stack([x.sum(1), x[:, 0] * x[:, 1], x.amax(1)], 1)


def loss_of(module: Callable[[Tensor], Tensor], step: int, *, rank: int | None = None) -> Tensor:
    x, y = batch(step, rank)
    dtype = next(iter(module.parameters())).dtype if isinstance(module, nn.Module) else x.dtype
    return nn.functional.mse_loss(module(x.to(dtype)).to(y.dtype), y)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.5)


def losses(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    steps: int = STEPS,
    loss: Callable[[nn.Module, int], Tensor] = loss_of,
    before_step: Callable[[], object] = lambda: None,
    turns: bool = True,
) -> list[float]:
    """Train; this rank's loss in each step.

    Args:
        loss: of the module in a step.
        before_step: called between backward and the optimizer's step.
        turns: two ranks at a time contribute (see above); else all.
    """
    optimizer = optimizer or sgd(module)
    seen = []
    for step in range(steps):
        value = loss(module, step)
        (value * share(step) if turns else value).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(value.item())
    return seen


def result(seen: list[float], module: nn.Module) -> dict[str, Any]:
    """Losses and this rank's parameters and buffers, ready to be compared."""
    return {"losses": seen, "state": whole(module.state_dict())}


def whole(tree: Any) -> Any:
    """A copy of a tree whose split tensors are gathered."""

    def gather(leaf: Any) -> Any:
        if hasattr(leaf, "full_tensor"):
            leaf = leaf.full_tensor()
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(gather, tree)


def tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """The leaves of what a case returns, by path, as tensors."""
    for path, leaf in pytree.tree_leaves_with_path(tree):
        name = pytree.keystr(path)
        if isinstance(leaf, Tensor):
            yield name, leaf.detach()
        elif isinstance(leaf, (int, float)):
            yield name, torch.tensor(leaf, dtype=torch.float64)
        elif leaf is not None:
            raise TypeError(f"{name} is a {type(leaf).__name__}: return tensors and numbers")
