"""Messages of one kind from one stage to another: activations, gradients, labels.

A message is written straight into a slot of its receiver's (csrc/point_to_point/frame.h): as many
slots wait as the schedule has in flight, so neither side waits for the other longer than for the
data, and no order of actions can dead-lock. Slots hold what the largest message of earlier steps
needed. A larger one leaves its slot empty and follows on a tag of its own, as does the layout of a
message that is laid out unlike the one before.

::

    tag      in slots        the message, or nothing if it is too large; with it, as immediate data,
                             its micro-batch and the bytes of its layout, 0 if that has not changed
    tag + 1  one at a time   layouts
    tag + 2  one at a time   messages too large for their slot
"""

from __future__ import annotations

import collections
import time
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from pycomm import device
from pycomm._core import Buffer, Group, TransferWork
from pycomm.errors import MismatchError
from pycomm.pipeline.layout import Layout
from pycomm.pipeline.micro_batches import map_tensors
from pycomm.work import keep_until_settled

TAGS = 3
"""Tags that one kind of message takes."""

_LEAST_SLOT_BYTES = 4096  # a page of the arena
_MICRO_BATCH_BITS = 32


class Outlet(Protocol):
    """Where messages go out, in the order of their micro-batches."""

    def begin(self, messages: int) -> None:
        """A step begins, in which so many messages go."""

    def send(self, value: Any, micro_batch: int) -> None:
        """Send a structure of tensors. Never waits; leave the tensors alone until ``settle()``."""

    def settle(self) -> None:
        """Wait until all has been received."""

    def abandon(self) -> None:
        """The step failed, and the group with it: keep the memory of what is under way on a GPU."""


class Inlet(Protocol):
    """Where they come in."""

    def begin(self, messages: int) -> None:
        """A step begins, in which so many messages come."""

    def receive(self, micro_batch: int) -> Any:
        """The next message, which must be of this micro-batch. Its tensors are views of a slot."""

    def release(self) -> None:
        """One more of the messages received is no longer needed: its slot can take another."""

    def abandon(self) -> None:
        """As of an ``Outlet``."""


class RemoteOutlet:
    """To another rank.

    Args:
        where: the device that messages leave from, of the receiver's kind; tensors that are
            elsewhere are copied to it.
    """

    def __init__(self, group: Group, dst: int, tag: int, where: torch.device) -> None:
        self._group = group
        self._dst = dst
        self._tag = tag
        self._where = where
        self._on_gpu = where.type == "cuda"
        self._capacity = 0  # of the slots, bytes
        self._largest = 0
        self._layout: Layout | None = None
        self._under_way: collections.deque[tuple[TransferWork, object]] = collections.deque()

    def begin(self, messages: int) -> None:
        self._capacity = _slot_bytes(self._largest)

    def send(self, value: Any, micro_batch: int) -> None:
        layout, dump = self._layout, b""
        if layout is not None and layout.is_of(value) and value.is_cuda is self._on_gpu:
            memory = value
        else:
            layout, tensors = Layout.of(value)
            memory = layout.pack(tensors, self._where)
            if layout != self._layout:
                dump = layout.dump()
            self._layout = layout
        self._largest = max(self._largest, layout.nbytes)
        fits = layout.nbytes <= self._capacity
        immediate = len(dump) << _MICRO_BATCH_BITS | micro_batch
        self._start(memory, layout.nbytes if fits else 0, 0, immediate)
        if dump:
            described = torch.frombuffer(bytearray(dump), dtype=torch.uint8)
            self._start(described, len(dump), 1)
        if not fits:
            self._start(memory, layout.nbytes, 2)

    def settle(self) -> None:
        while self._under_way:
            work = self._under_way[0][0]
            self._group.wait(work)
            # A GPU may have yet to read the memory: what comes to use it waits there.
            work.order_before(device.current_stream)
            self._under_way.popleft()  # and with it the memory

    def abandon(self) -> None:
        _abandon(self._under_way)

    def _start(self, memory: Tensor, nbytes: int, lane: int, immediate: int = 0) -> None:
        while self._under_way and self._under_way[0][0].settled():
            self._under_way.popleft()
        work = self._group.send_to_slot(
            memory.data_ptr(),
            nbytes,
            self._dst,
            self._tag + lane,
            immediate,
            place=device.place_of(memory),
        )
        if not work.settled():
            self._under_way.append((work, memory.detach()))


class RemoteInlet:
    """From another rank.

    Args:
        slots: how many messages may be here at once, in use or waiting.
        where: the device that they come to.
    """

    def __init__(self, group: Group, src: int, tag: int, slots: int, where: torch.device) -> None:
        self.wait_seconds = 0.0
        """Time that ``receive`` has waited, in all steps."""
        self._group = group
        self._src = src
        self._tag = tag
        self._slots = slots
        self._where = where
        self._memory = _SlotMemory(group) if where.type == "cpu" else None
        self._capacity = 0
        self._largest = 0
        self._layout: Layout | None = None
        self._to_post = 0
        self._posted: collections.deque[tuple[TransferWork, Buffer | Tensor]] = collections.deque()

    def begin(self, messages: int) -> None:
        assert not self._posted
        self._capacity = _slot_bytes(self._largest)
        self._to_post = messages
        for _ in range(min(self._slots, messages)):
            self._post()

    def receive(self, micro_batch: int) -> Any:
        started = time.perf_counter()
        work, slot = self._posted.popleft()
        self._wait(work)
        its_number = work.immediate & (1 << _MICRO_BATCH_BITS) - 1
        if its_number != micro_batch:
            raise MismatchError(
                f"rank {self._group.rank} expected micro-batch {micro_batch} and rank {self._src} "
                f"sent {its_number}.\n  Give every rank the same schedule."
            )
        dump_bytes = work.immediate >> _MICRO_BATCH_BITS
        if dump_bytes:
            dump = self._group.allocate(dump_bytes)
            self._wait(self._group.receive_into_slot(dump, self._src, self._tag + 1))
            self._layout = Layout.load(bytes(memoryview(dump)[:dump_bytes]))
        layout = self._layout
        assert layout is not None
        self._largest = max(self._largest, layout.nbytes)
        if layout.nbytes > self._capacity:
            slot = self._allocate(layout.nbytes)
            self._wait(self._start(slot, 2))
        self.wait_seconds += time.perf_counter() - started
        lone = layout.lone
        if self._memory is not None and lone is not None and lone.nbytes:
            t = self._memory.lend(slot, lone.dtype, lone.nbytes // lone.dtype.itemsize)
            return t.view(lone.shape).requires_grad_(lone.requires_grad)
        return layout.unpack(self._tensor(slot))

    def release(self) -> None:
        if self._to_post:
            self._post()

    def abandon(self) -> None:
        _abandon(self._posted)

    @property
    def layout(self) -> Layout | None:
        """Of the last message."""
        return self._layout

    def _post(self) -> None:
        self._to_post -= 1
        slot = self._allocate(self._capacity)
        self._posted.append((self._start(slot, 0), slot))

    def _start(self, slot: Buffer | Tensor, lane: int) -> TransferWork:
        tag = self._tag + lane
        if isinstance(slot, Buffer):
            return self._group.receive_into_slot(slot, self._src, tag)
        memory = (slot.data_ptr(), slot.nbytes)
        place = device.place_of(slot)
        return self._group.receive_into_slot(memory, self._src, tag, place=place)

    def _allocate(self, nbytes: int) -> Buffer | Tensor:
        if self._memory is None:  # torch's allocator is fast, and knows when it is free
            return torch.empty(nbytes, dtype=torch.uint8, device=self._where)
        return self._memory.take(nbytes)

    def _tensor(self, slot: Buffer | Tensor) -> Tensor:
        if isinstance(slot, Tensor):
            return slot
        assert self._memory is not None
        return self._memory.lend(slot)

    def _wait(self, work: TransferWork) -> None:
        self._group.wait(work)
        if self._memory is None:
            work.order_before(device.current_stream)


class Local:
    """Both ends, where the two stages are on one rank."""

    def __init__(self) -> None:
        self._sent: collections.deque[Any] = collections.deque()

    def begin(self, messages: int) -> None:
        self._sent.clear()  # of a step that an exception ended

    def send(self, value: Any, micro_batch: int) -> None:
        self._sent.append(map_tensors(_cut_from_graph, value))

    def receive(self, micro_batch: int) -> Any:
        return self._sent.popleft()

    def release(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _SlotMemory:
    """Pieces of the arena, each used again once no tensor that views it is left."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._lent: list[tuple[Buffer, weakref.ref[memoryview]]] = []

    def take(self, nbytes: int) -> Buffer:
        """One that nobody uses, of this many bytes or more."""
        for number, (buffer, lease) in enumerate(self._lent):
            if lease() is None:
                del self._lent[number]
                if len(buffer) >= nbytes:
                    return buffer
                break  # it is of a step with smaller messages
        return self._group.allocate(nbytes)

    def lend(
        self, buffer: Buffer | Tensor, dtype: torch.dtype = torch.uint8, count: int = -1
    ) -> Tensor:
        """Its elements, all of its bytes by default. What views them keeps the lease alive."""
        assert isinstance(buffer, Buffer)
        lease = memoryview(buffer)
        self._lent.append((buffer, weakref.ref(lease)))
        return torch.frombuffer(lease, dtype=dtype, count=count)


def _abandon(under_way: collections.deque[Any]) -> None:
    while under_way:
        keep_until_settled(*under_way.popleft())


def _slot_bytes(largest: int) -> int:
    return -(-max(largest, 1) // _LEAST_SLOT_BYTES) * _LEAST_SLOT_BYTES


def _cut_from_graph(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)
