"""Steps that all ranks take, and that fail on all ranks if they fail on one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from pycomm._core import Group
from pycomm.errors import (
    CommError,
    CommTimeoutError,
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
)
from pycomm.objects import raise_together

T = TypeVar("T")


def together(call: str, group: Group, action: Callable[[], T], *, root: int | None = None) -> T:
    """What ``action`` returns here, once it has returned on every rank.

    Args:
        call: for errors.
        root: the only rank to act; the others get None.

    Raises:
        InvalidArgumentError: on every rank, if it raised anything on one.
        PeerLostError, CommTimeoutError: a rank did not come back from it.
    """
    result: T | None = None
    mistake: Exception | None = None
    if root is None or group.rank == root:
        try:
            result = action()
        except InvalidArgumentError as error:
            mistake = error
        except CommError:
            raise
        except Exception as error:  # of a disk, of a user's class
            mistake = error
    raise_together(call, mistake, group)
    return result  # type: ignore[return-value]  # None where another rank acted


@contextlib.contextmanager
def naming(call: str, consequence: str) -> Iterator[None]:
    """Let errors about ranks that do not come say what they were awaited for."""
    try:
        yield
    except (CommTimeoutError, MismatchError, PeerLostError) as error:
        text = f"{call}: {error}\n  {consequence}"
        raise type(error)(text, group_usable=error.group_usable) from error
