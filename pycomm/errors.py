"""Everything pycomm raises. The C++ core's errors of the same names arrive as these classes.

All derive from ``RuntimeError``, which training frameworks catch. After ``InvalidArgumentError``
and ``NotInitializedError`` nothing was sent and the group is as usable as before; after the other
three the group is finished and every later call on it raises the same error.
"""

from __future__ import annotations


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


class StageError(CommError):
    """A stage of a pipeline raised while it computed; the cause is what it raised.

    The other ranks of the pipeline get a PeerLostError that quotes it. The pipeline is finished.
    """
