"""Collectives and messages of ordinary tensors in one call from Python to the core."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch

from pycomm import _core

Function = TypeVar("Function", bound=Callable[..., object])

# all_reduce(group, input, output, op), where both tensors may be the same: False, and nothing done,
# unless they need no preparation. set_world(group) is for pycomm.runtime alone.
all_reduce, _shortened, set_world = _core.tensor_calls(
    torch.Tensor,
    torch.Tensor.is_neg,
    torch._C._increment_version,
)


def shortened(function: Function) -> Function:
    """Let ordinary calls of ``function`` skip it: it is one of those the core knows by their name.

    Ordinary: contiguous CPU tensors without gradient, no keyword but those that say who takes part
    (``op``, ``root``, ``dst``, ``src``, ``tag``, ``group``). All others reach ``function``, whose
    name, documentation and signature the result has.
    """
    return cast("Function", functools.update_wrapper(_shortened(function), function))
