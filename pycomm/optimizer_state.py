"""Putting state into an optimizer, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def options_of(param_group: Mapping[str, Any]) -> dict[str, Any]:
    """What a param group says, but for its parameters and their names."""
    return {key: value for key, value in param_group.items() if not key.startswith("param")}


def install_state(
    optimizer: Optimizer,
    states: Mapping[Tensor, Mapping[str, Any]],
    options: Sequence[Mapping[str, Any]],
) -> None:
    """Replace all state of an optimizer, by way of its ``load_state_dict``.

    Args:
        states: of each parameter; one that is not there gets none.
        options: of each param group; one that is not there stays as it is.
    """
    packed = optimizer.state_dict()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    packed["state"] = {
        number: dict(states[param]) for number, param in enumerate(params) if param in states
    }
    packed["param_groups"] = [
        {**own, **theirs} for own, theirs in zip(packed["param_groups"], options, strict=True)
    ]
    optimizer.load_state_dict(packed)
    # Torch has given floating-point state the dtype of its parameter.
    for param, state in states.items():
        for key, value in state.items():
            now = optimizer.state[param].get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[param][key] = value.to(now.device)
