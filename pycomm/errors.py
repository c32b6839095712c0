"""Everything pycomm raises. The C++ core's errors of the same names arrive as these classes.

All derive from ``RuntimeError``, which training frameworks catch. After ``InvalidArgumentError``
and ``NotInitializedError`` nothing was sent and the group is as usable as before. So it is after
``NonFiniteError`` and ``DriftError``, which are about data, and which every rank raises. After
``MismatchError``, ``CommTimeoutError`` and ``PeerLostError`` the group is finished and every later
call on it raises the same error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


class CommError(RuntimeError):
    """Root of the tree. Raised itself when the machine or the installation does not play along.

    The group, if there is one already, stays usable.
    """


class InvalidArgumentError(CommError, ValueError):
    """This rank's mistake, found before anything was sent. The group stays usable."""


class NotInitializedError(CommError):
    """A call before ``init()``, after ``shutdown()``, or in a forked child. Nothing was sent."""


class MismatchError(CommError):
    """Ranks made different calls at the same position. The group is finished."""


class CommTimeoutError(CommError, TimeoutError):
    """A peer did not come in time. The group is finished."""


class PeerLostError(CommError):
    """A peer's process is gone or has given up. The group is finished."""


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
