"""From and to the weights of a model that is not split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pycomm.errors import InvalidArgumentError
from pycomm.shares import joined, named_shares


def whole_state_dict(module: nn.Module) -> dict[str, Any]:
    """The ``state_dict()`` of the same model built of ordinary layers; on every rank. Collective.

    Args:
        module: whose layers, split or not, have the names that they have in the ordinary model. All
            ranks that share it make this call.

    Memory: the whole model.
    """
    state: dict[str, Any] = module.state_dict()
    known: dict[tuple[int, int], Tensor] = {}  # a shared parameter is put together once
    for name, param, share in named_shares(module):
        place = (param.data_ptr(), share.dim)
        if place not in known:
            known[place] = joined(param, share)
        state[name] = known[place]
    return state


def load_whole_state_dict(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Take this rank's shares out of the state of an ordinary model. No communication.

    Args:
        module: as for ``whole_state_dict``.
        state_dict: of the ordinary model, the same on every rank.

    Raises:
        InvalidArgumentError: a name is missing or unknown, or a tensor has another shape; the
            module keeps what it has.
    """
    state = dict(state_dict)
    own = module.state_dict()
    problems = [f"'{name}' is missing" for name in own if name not in state]
    problems += [f"'{name}' is unknown" for name in state if name not in own]
    shapes = {name: tuple(value.shape) for name, value in own.items() if isinstance(value, Tensor)}
    shares = {name: share for name, _, share in named_shares(module)}
    shapes.update({name: share.whole for name, share in shares.items()})
    for name, shape in shapes.items():
        value = state.get(name)
        if isinstance(value, Tensor) and tuple(value.shape) != shape:
            problems.append(f"'{name}' has shape {tuple(value.shape)} instead of {shape}")
    if problems:
        raise InvalidArgumentError(
            "load_whole_state_dict: " + "; ".join(problems[:10]) + (" ..." if problems[10:] else "")
        )
    for name, share in shares.items():
        length = own[name].shape[share.dim]
        state[name] = state[name].narrow(share.dim, share.begin, length)
    module.load_state_dict(state)
