"""What changes in the training when the number of ranks does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pycomm.elastic.sampler import Sampler
from pycomm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pycomm.elastic.state import State

Rule = Literal["keep_global_batch", "scale_learning_rate", "none"] | Callable[..., object]
"""``keep_global_batch``: each rank takes a larger or smaller part of the same batches; the training
goes as if nothing had happened.

``scale_learning_rate``: each rank's part stays as it is, so the batches shrink or grow, and the
learning rates of all optimizers with them (Goyal et al., arXiv:1706.02677, section 2.1).

``none``: each rank's part stays as it is, and so do the learning rates.

A function is called with the state, the number of ranks before and the number now.
"""

RULES = ("keep_global_batch", "scale_learning_rate", "none")


def check(rule: Rule) -> None:
    """
    Raises:
        InvalidArgumentError: it is none.
    """
    if rule not in RULES and not callable(rule):
        raise InvalidArgumentError(
            f"rescale is {rule!r}. Pass one of {', '.join(RULES)}, or a function of the state, the "
            "number of ranks before and the number now."
        )


def rescale(rule: Rule, state: State, things: Mapping[str, Any], before: int, now: int) -> None:
    """Adapt what was committed on ``before`` ranks to ``now``. The same on every rank."""
    if before == now:
        return
    if not isinstance(rule, str):
        rule(state, before, now)
        return
    if rule == "keep_global_batch":
        return
    for thing in things.values():
        if isinstance(thing, Sampler):
            thing.batch = max(1, round(thing.batch * now / before))
        elif rule == "scale_learning_rate":
            _scale(thing, now / before)


def _scale(thing: object, factor: float) -> None:
    if isinstance(thing, Optimizer):
        for group in thing.param_groups:
            for name in ("lr", "initial_lr"):  # schedulers keep the second one there
                if isinstance(group.get(name), Tensor):
                    group[name].mul_(factor)
                elif name in group:
                    group[name] *= factor
    elif isinstance(thing, LRScheduler):
        thing.base_lrs = [rate * factor for rate in thing.base_lrs]
