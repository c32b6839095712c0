"""The gloo group behind a pycomm group, for what torch lets no Python class answer.

Torch's C++ code asks a group for the backend of a device in a few places (its device types, its
name, its sequence number, and collectives for which there is no override), and takes a C++ object
only. Gloo gives the right answers; a stand-in that does nothing would give wrong data in silence.
It connects to nobody before it is used.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Fallback(dist.ProcessGroupGloo):
    """Gloo, lazily connected. What torch sets on it is also set on the group in front of it."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta,
        set_timeout: Callable[[timedelta], None],
    ) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_default_device(lazy_init=True)]
        options._timeout = timeout
        super().__init__(dist.PrefixStore("fallback", store), rank, size, options)
        self._set_timeout = set_timeout
        _fallbacks.add(self)

    def _set_default_timeout(self, timeout: timedelta) -> None:
        super()._set_default_timeout(timeout)
        self._set_timeout(timeout)


_fallbacks: weakref.WeakSet[Fallback] = weakref.WeakSet()


def _never_destroy() -> None:
    """In a forked child gloo's destructor would wait for ever, for threads of the parent's."""
    for fallback in _fallbacks:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(fallback))


os.register_at_fork(after_in_child=_never_destroy)
