"""Everything pycomm raises. The C++ core's errors of the same names arrive as these classes.

All derive from ``RuntimeError``, which training frameworks catch. ``error.group_usable`` says
whether the group that made the call can go on. After ``InvalidArgumentError`` and
``NotInitializedError`` nothing was sent and the group is as usable as before; so it is after
``NonFiniteError`` and ``DriftError``, which are about data, and which every rank raises. After the
others it is finished, unless they say otherwise: every later call on it raises the same error, and
``shutdown()`` and ``init()`` start over (without the lost rank, where one is lost: see
``pycomm.elastic``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


class CommError(RuntimeError):
    """Root of the tree. Raised itself when the machine or the installation does not play along.

    The group, if there is one already, stays usable.

    Args:
        text: what, where, and what next.
        group_usable: if it is otherwise than after most errors of the class.
    """

    group_usable = True
    """Whether the group that made the call can make others."""

    def __init__(self, text: str = "", *, group_usable: bool | None = None) -> None:
        super().__init__(text)
        if group_usable is not None:
            self.group_usable = group_usable


class InvalidArgumentError(CommError, ValueError):
    """This rank's mistake, found before anything was sent. The group stays usable."""


class NotInitializedError(CommError):
    """A call before ``init()``, after ``shutdown()``, or in a forked child. Nothing was sent."""


class MismatchError(CommError):
    """Ranks made different calls at the same position. The group is finished.

    It stays usable where ranks compared what they were given before they began
    (``broadcast_parameters``, ``DistributedOptimizer``, ``checkpoint.save`` and the like).
    """

    group_usable = False


class CommTimeoutError(CommError, TimeoutError):
    """A peer did not come in time. The group is finished."""

    group_usable = False


class PeerLostError(CommError):
    """A peer's process is gone or has given up. The group is finished."""

    group_usable = False


@dataclasses.dataclass(frozen=True)
class NonFiniteGradient:
    """A parameter whose reduced gradient holds NaN or infinity, and where that came from."""

    name: str
    ranks: tuple[int, ...]
    """The ranks, of the optimizer's group, whose own gradient held it. Empty: all of them were
    finite, and it arose when they were summed (or compressed)."""
    bucket: int | None = None
    """In which the gradient was reduced, where there are buckets."""

    def __str__(self) -> str:
        place = f"'{self.name}'" if self.bucket is None else f"'{self.name}' (bucket {self.bucket})"
        if not self.ranks:
            return f"{place}: finite on every rank, and the sum overflowed; no rank brought it"
        which = "rank" if len(self.ranks) == 1 else "ranks"
        return f"{place}: {which} {', '.join(map(str, self.ranks))} brought NaN or infinity"


class NonFiniteError(CommError, FloatingPointError):
    """Gradients are NaN or infinite, on every rank. The group and the optimizer stay usable."""

    def __init__(self, text: str, gradients: Sequence[NonFiniteGradient] = ()) -> None:
        super().__init__(text)
        self.gradients = tuple(gradients)
        """All of them, where the text names the first."""


class DriftError(CommError):
    """Replicas of a model are no longer the same. Every rank raises it; the group stays usable."""


class StageError(CommError):
    """A stage of a pipeline raised while it computed; the cause is what it raised.

    The other ranks of the pipeline get a PeerLostError that quotes it. The pipeline is finished.
    """

    group_usable = False
