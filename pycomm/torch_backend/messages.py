"""Torch's messages from one rank to another, in terms of the core's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pycomm._core import Group
from pycomm.arguments import movable, rank_of, refuse
from pycomm.device import place_of
from pycomm.memory import dense
from pycomm.torch_backend.tensors import Place, delivered, only, plain
from pycomm.work import Work, nothing


def send(
    tensors: Sequence[Tensor], dst: int, tag: int, group: Group, timeout_s: float
) -> Work[None]:
    """Torch compares the number of elements of a message, not its shape."""
    t = plain("send", only("send", "tensors", tensors, group), group)
    dtype = movable("send", "tensor", t, group)
    source = dense(t)
    work = group.isend(
        source.data_ptr(),
        t.numel(),
        dtype,
        rank_of("send", "dst", dst, group),
        _tag("send", tag, group),
        place=place_of(source),
        timeout_s=timeout_s,
    )
    return Work(_DrivenByWaiter(work, group), source, nothing)


def recv(
    tensors: Sequence[Tensor], src: int | None, tag: int, group: Group, timeout_s: float
) -> Work[int]:
    """Its result is whose message it was; ``src`` None takes the earliest of any rank."""
    t = plain("recv", only("recv", "tensors", tensors, group), group)
    dtype = movable("recv", "tensor", t, group)
    place = Place("recv", t, group, row_major=True)
    work = group.irecv(
        place.address,
        t.numel(),
        dtype,
        None if src is None else rank_of("recv", "src", src, group),
        _tag("recv", tag, group),
        place=place_of(t),
        timeout_s=timeout_s,
    )

    def finish() -> int:
        place.copy_back()
        return work.source

    kind = Work if place.memory is t else delivered
    return kind(_DrivenByWaiter(work, group), place.memory, finish)


class _DrivenByWaiter:
    """A message whose waiter moves it himself where he can."""

    def __init__(self, work: Any, group: Group) -> None:
        self._work = work
        self._group = group
        self.done = work.done
        self.settled = work.settled
        self.announce_to = work.announce_to
        self.order_before = work.order_before

    def wait(self) -> None:
        self._group.wait(self._work)

    @property
    def seconds(self) -> float:
        seconds: float = self._work.seconds
        return seconds


def _tag(call: str, tag: int, group: Group) -> int:
    if not 0 <= tag < 1 << 31:
        refuse(call, group, f"tag is {tag}. Pass a whole number from 0 to 2147483647.")
    return tag
