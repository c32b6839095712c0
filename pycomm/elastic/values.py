"""What things hold, taken as a copy in the host's memory and put back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# In which tensors are looked for; of these types alone, whose copies are made up of copies.
_MAPPINGS = (dict, OrderedDict)
_SEQUENCES = (list, tuple)


def has_state(thing: object) -> bool:
    """Whether its state can be taken and put back, rather than the thing itself."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def take(things: Mapping[str, Any], spare: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of all that they hold.

    Args:
        spare: an older copy, whose tensors may be written over: fresh memory costs more.

    Cost: one copy of every tensor.
    """
    copier = _Copier()
    return {
        name: copier.copied(thing.state_dict() if has_state(thing) else thing, spare.get(name))
        for name, thing in things.items()
    }


def put(things: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Give things with a state the one that was taken, and return the others by name.

    Gradients are dropped.
    """
    plain = {}
    copier = _Copier()  # things keep what they are given
    for name, thing in things.items():
        value = copier.copied(values[name])
        if isinstance(thing, Optimizer):
            _load_optimizer(thing, value)
            thing.zero_grad(set_to_none=True)
        elif has_state(thing):
            thing.load_state_dict(value)
            if isinstance(thing, nn.Module):
                thing.zero_grad(set_to_none=True)
        else:
            plain[name] = placed(value, thing)
    return plain


def placed(value: Any, like: Any) -> Any:
    """``value`` with its tensors on the devices of those in the same place in ``like``."""
    if isinstance(value, Tensor):
        return value.to(like.device) if isinstance(like, Tensor) else value
    if type(value) in _MAPPINGS and isinstance(like, Mapping):
        return type(value)((key, placed(of_key, like.get(key))) for key, of_key in value.items())
    if type(value) in _SEQUENCES and type(like) is type(value):
        pairs = zip_longest(value, like[: len(value)])
        return type(value)(placed(item, of_item) for item, of_item in pairs)
    return value


def requires_gradients(value: Any) -> bool:
    """Whether one of the tensors in it does."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if type(value) in _MAPPINGS:
        return any(map(requires_gradients, value.values()))
    return type(value) in _SEQUENCES and any(map(requires_gradients, value))


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    # torch casts state to its parameter's dtype while loading.
    installed = optimizer.state_dict()["state"]
    for key, entry in state["state"].items():
        for name, value in entry.items():
            mine = installed[key][name]
            if isinstance(value, Tensor) and mine.dtype != value.dtype:
                installed[key][name] = value.to(mine.device)


class _Copier:
    """Copies tensors to the host's memory, one that is there twice once."""

    def __init__(self) -> None:
        # Tensors and their copies by the tensors' ids, which stay theirs while they are alive.
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: set[int] = set()  # spare ones

    def copied(self, value: Any, spare: Any = None) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._made:
                self._made[id(value)] = value, self._copied_tensor(value.detach(), spare)
            return self._made[id(value)][1]
        if type(value) in _MAPPINGS:
            of_key = spare if isinstance(spare, dict) else {}
            made = type(value)((k, self.copied(v, of_key.get(k))) for k, v in value.items())
            if hasattr(value, "_metadata"):  # of a module's
                made._metadata = value._metadata
            return made
        if type(value) in _SEQUENCES:
            fits = type(spare) is type(value) and len(spare) == len(value)
            spares = spare if fits else [None] * len(value)
            return type(value)(self.copied(v, s) for v, s in zip(value, spares, strict=True))
        return copy.deepcopy(value)

    def _copied_tensor(self, value: Tensor, spare: Any) -> Tensor:
        fits = (
            isinstance(spare, Tensor)
            and id(spare) not in self._written
            and spare.dtype == value.dtype
            and spare.layout == value.layout == torch.strided
            and (spare.shape, spare.stride()) == (value.shape, value.stride())
        )
        if not fits:
            return value.to("cpu", copy=True)
        self._written.add(id(spare))
        return spare.copy_(value)  # type: ignore[no-any-return]
