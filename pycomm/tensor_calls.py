"""Collectives on ordinary tensors in one call from Python to the core."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch

from pycomm import _core

Function = TypeVar("Function", bound=Callable[..., object])

# all_reduce(group, input, output, op), where both tensors may be the same: False, and nothing done,
# unless they need no preparation. set_world(group) is for pycomm.runtime alone.
all_reduce, _in_place, set_world = _core.tensor_calls(
    torch.Tensor,
    torch.Tensor.is_neg,
    torch._C._increment_version,
)


def all_reduces_in_place(function: Function) -> Function:
    """Let calls ``function(t)`` and ``function(t, op)`` on the world skip it if ``t`` is ordinary.

    All others reach ``function``, whose name, documentation and signature the result has.
    """
    return cast("Function", functools.update_wrapper(_in_place(function), function))
