"""Skip connections from one stage to a later one, past those between.

::

    nn.Sequential(Stash("early"), block_1, block_2, Take("early", torch.add))

Within one process, without a pipeline, the two modules work alike.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from pycomm.errors import InvalidArgumentError


class Stash(nn.Module):
    """Returns its input and keeps it for the ``Take`` of the same name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, value: Any) -> Any:
        _kept()[self.name] = value
        return value

    def extra_repr(self) -> str:
        return repr(self.name)


class Take(nn.Module):
    """Returns ``combine(input, stashed)``, or the pair of them.

    Args:
        name: of the ``Stash``, which comes before; each is taken once.
        combine: such as ``torch.add``; a module's parameters are trained with the others.
    """

    def __init__(self, name: str, combine: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.name = name
        self.combine = combine

    def forward(self, value: Any) -> Any:
        kept = _kept()
        if self.name not in kept:
            raise InvalidArgumentError(
                f'Take("{self.name}") found nothing: Stash("{self.name}") has not run before it.'
            )
        stashed = kept.pop(self.name)
        return (value, stashed) if self.combine is None else self.combine(value, stashed)

    def extra_repr(self) -> str:
        return repr(self.name)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}


_thread = _Thread()


def _kept() -> dict[str, Any]:
    return _thread.kept


@contextlib.contextmanager
def keeping(taken: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Let modules called inside take from ``taken``; it then holds what they have stashed."""
    before, _thread.kept = _thread.kept, taken
    try:
        yield taken
    finally:
        _thread.kept = before


def names(module: nn.Module) -> tuple[list[str], list[str]]:
    """What the modules within stash and what they take, a name that stays within left out.

    Raises:
        InvalidArgumentError: a name is stashed or taken twice.
    """
    stashed = [part.name for part in module.modules() if isinstance(part, Stash)]
    taken = [part.name for part in module.modules() if isinstance(part, Take)]
    for kind, found in (("Stash", stashed), ("Take", taken)):
        twice = next((name for name in found if found.count(name) > 1), None)
        if twice is not None:
            raise InvalidArgumentError(
                f'there is more than one {kind}("{twice}").\n  Give each connection its own name.'
            )
    return (
        [name for name in stashed if name not in taken],
        [name for name in taken if name not in stashed],
    )
