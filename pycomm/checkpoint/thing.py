"""What ``save`` and ``load`` are given, each under a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pycomm._core import Group
from pycomm.checkpoint.contents import Contents, Wanted
from pycomm.checkpoint.saved import Saved


class Thing(Protocol):
    """Something that has a state. Nothing here communicates."""

    name: str
    kind: str
    """"module", "optimizer", "object" or "value": what a checkpoint keeps under the name."""

    @property
    def spreads(self) -> Sequence[tuple[str, Group]]:
        """How it is divided, and the ranks that have a part of it each."""

    def contents(self) -> Contents:
        """What this rank has to save.

        Raises:
            InvalidArgumentError: something that cannot be saved.
        """

    def wanted(self, saved: Saved) -> Wanted:
        """What this rank has to read.

        Raises:
            InvalidArgumentError: the checkpoint's does not fit.
        """

    def claims(self, saved: Saved) -> set[str]:
        """Names of the checkpoint that have a use on this rank, without the thing's own."""

    def check(self, values: Mapping[str, Any]) -> None:
        """Look at the values, before tensors are read and anything is changed.

        Raises:
            InvalidArgumentError: they do not fit.
        """

    def install(self, values: Mapping[str, Any]) -> None:
        """Take the values, after tensors were read into ``wanted``."""
