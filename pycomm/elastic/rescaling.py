"""What changes in the training when the number of ranks does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

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

# Learning rates in param groups: schedules keep theirs there too.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# Attributes of schedules that hold learning rates: lists of one for each param group, and numbers.
_LISTS_OF_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_RATES = ("eta_min", "default_min_lr")
# Those of torch, which keep their rates nowhere else.
_SCHEDULES = (
    lr_scheduler.ChainedScheduler,
    lr_scheduler.ConstantLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.CyclicLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.LambdaLR,
    lr_scheduler.LinearLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.OneCycleLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.ReduceLROnPlateau,
    lr_scheduler.SequentialLR,
    lr_scheduler.StepLR,
    SWALR,
)


def check(rule: Rule, things: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidArgumentError: it is none, or does not know how to adapt one of ``things``.
    """
    if rule not in RULES and not callable(rule):
        raise InvalidArgumentError(
            f"rescale is {rule!r}. Pass one of {', '.join(RULES)}, or a function of the state, the "
            "number of ranks before and the number now."
        )
    if rule != "scale_learning_rate":
        return
    for name, thing in things.items():
        for schedule in _schedules(thing):
            if type(schedule) not in _SCHEDULES:
                raise InvalidArgumentError(
                    f"elastic.run: rescale is {rule!r}, and where '{name}' keeps learning rates is "
                    f"not known: it is, or has in it, a {type(schedule).__qualname__}.\n"
                    "  Pass as rescale= a function of the state, the number of ranks before and "
                    "the number now that scales them, or a schedule of torch.optim.lr_scheduler."
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
    each = list({id(thing): thing for thing in things.values()}.values())  # one may have two names
    for thing in each:
        if isinstance(thing, Sampler):
            thing.rescale(before, now)
    if rule == "scale_learning_rate":
        _scale(each, now / before)


def _scale(things: list[Any], factor: float) -> None:
    scaled = set[int]()  # tensors that several param groups share
    for optimizer in things:
        if isinstance(optimizer, Optimizer):
            for group in optimizer.param_groups:
                _scale_group(group, factor, scaled)
    schedules = [schedule for thing in things for schedule in _schedules(thing)]
    for schedule in {id(schedule): schedule for schedule in schedules}.values():
        _scale_schedule(schedule, factor)


def _scale_group(group: dict[str, Any], factor: float, scaled: set[int]) -> None:
    for name in _GROUP_RATES:
        rate = group.get(name)
        if isinstance(rate, Tensor):
            if id(rate) not in scaled:
                rate.mul_(factor)
                scaled.add(id(rate))
        elif rate is not None:
            group[name] = rate * factor


def _scale_schedule(schedule: Any, factor: float) -> None:
    for name in _LISTS_OF_RATES:
        if hasattr(schedule, name):
            setattr(schedule, name, [rate * factor for rate in getattr(schedule, name)])
    for name in _RATES:
        if getattr(schedule, name, None) is not None:
            setattr(schedule, name, getattr(schedule, name) * factor)


def _schedules(thing: Any) -> list[Any]:
    """``thing``, if it is a schedule (of another library too), and those in it."""
    has_optimizer = isinstance(getattr(thing, "optimizer", None), Optimizer)
    if not isinstance(thing, LRScheduler) and not has_optimizer:
        return []
    inner = getattr(thing, "_schedulers", ())
    return [thing, *(schedule for part in inner for schedule in _schedules(part))]
