"""The gloo group behind a pycomm group, for what torch lets no Python class answer.

Torch's C++ code asks a group for the backend of a device in a few places (its device types, its
name, and collectives for which there is no override), and takes a C++ object only. Gloo gives the
right answers; a stand-in that does nothing would give wrong data in silence. It connects to nobody
before it is used; only PyTorch 2.6 knows no such devices, and it connects at once there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
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
        *,
        several_hosts: bool,
    ) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [_device(several_hosts)]
        options._timeout = timeout
        super().__init__(dist.PrefixStore("fallback", store), rank, size, options)
        self._set_timeout = weakref.WeakMethod(set_timeout)  # of the group, which has this one
        _fallbacks.add(self)

    def _set_default_timeout(self, timeout: timedelta) -> None:
        super()._set_default_timeout(timeout)
        set_timeout = self._set_timeout()
        if set_timeout is not None:
            set_timeout(timeout)


_fallbacks: weakref.WeakSet[Fallback] = weakref.WeakSet()


def _never_destroy() -> None:
    """In a forked child gloo's destructor would wait for ever, for threads of the parent's."""
    for fallback in _fallbacks:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(fallback))


os.register_at_fork(after_in_child=_never_destroy)


def _device(several_hosts: bool) -> Any:
    """The network device by which this rank's peers reach it.

    Gloo would take the address of the host's name. Where that is a loopback address, or the name
    unknown, no other host can connect: the one that is seen on the way to rank 0 is better.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface:
        return _lazy(dist.ProcessGroupGloo.create_device, interface=interface)
    if several_hosts:
        with contextlib.suppress(OSError):  # nobody said where rank 0 is, or its name is unknown
            address = _address_towards(os.environ.get("MASTER_ADDR", ""))
            return _lazy(dist.ProcessGroupGloo.create_device, hostname=address)
    return _lazy(dist.ProcessGroupGloo.create_default_device)


def _lazy(create: Callable[..., Any], **where: str) -> Any:
    try:
        return create(**where, lazy_init=True)
    except TypeError:  # PyTorch 2.6
        return create(**where)


def _address_towards(host: str) -> str:
    if not host:
        raise OSError("no host")
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # sends nothing
        probe.connect(address)
        return str(probe.getsockname()[0])
