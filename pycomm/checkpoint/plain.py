"""Things that are the same on every rank: values, and objects that have a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pycomm._core import Group
from pycomm.checkpoint.contents import Contents, Wanted
from pycomm.checkpoint.saved import Saved
from pycomm.checkpoint.values import entry_of


class _OneValue:
    """What one value in the checkpoint stands for. Fits wherever it is."""

    spreads: Sequence[tuple[str, Group]] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def wanted(self, saved: Saved) -> Wanted:
        """See ``Thing``."""
        return Wanted(values=[self.name])

    def claims(self, saved: Saved) -> set[str]:
        """See ``Thing``."""
        return set()

    def check(self, values: Mapping[str, Any]) -> None:
        """See ``Thing``."""


class ObjectThing(_OneValue):
    """Anything with ``state_dict()`` and ``load_state_dict()``: schedulers, scalers, samplers."""

    kind = "object"

    def __init__(self, name: str, thing: Any) -> None:
        super().__init__(name)
        self._thing = thing

    def contents(self) -> Contents:
        """See ``Thing``."""
        return Contents(values=[entry_of(self.name, self._thing.state_dict())])

    def install(self, values: Mapping[str, Any]) -> None:
        """See ``Thing``."""
        self._thing.load_state_dict(values[self.name])


class ValueThing(_OneValue):
    """A value, which ``load`` returns."""

    kind = "value"

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name)
        self._value = value

    def contents(self) -> Contents:
        """See ``Thing``."""
        return Contents(values=[entry_of(self.name, self._value)])

    def install(self, values: Mapping[str, Any]) -> None:
        """See ``Thing``: the caller gets it."""
