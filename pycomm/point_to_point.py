"""Messages from one rank to another."""

import dataclasses
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pycomm._core import DType, Group
from pycomm.arguments import integer, movable, rank_of, refuse, seconds
from pycomm.device import place_of
from pycomm.errors import InvalidArgumentError
from pycomm.memory import dense, writable
from pycomm.runtime import group_of
from pycomm.tensor_calls import shortened
from pycomm.work import Work, nothing


@shortened
def send(
    tensor: Tensor,
    dst: int,
    *,
    tag: int = 0,
    group: Group | None = None,
    timeout_s: float | None = None,
) -> None:
    """Send ``tensor`` to rank ``dst``, which makes a ``recv`` of the same shape, dtype and tag.

    Messages of one sender and tag are received in the order they were sent. They keep no order
    with collectives, nor with messages of other tags or ranks, and wait for none of them.

    Up to 1 KiB the call may return before anybody receives; beyond that it waits for the receiver,
    so two ranks that send to each other first and receive then wait forever: use ``isend``.

    Args:
        tensor: any strides; left as it was.
        dst: a rank of the group, this one too.
        tag: tells messages apart; not negative.
        group: where ``dst`` counts, the world if None.
        timeout_s: seconds for the whole call; the group's default if None.

    Raises:
        InvalidArgumentError: dtype, device, rank or tag. Nothing was sent; the group stays usable.
        MismatchError: the receiver gave another shape or dtype; raised on both ranks (on the sender
            of a message that was buffered: by a later call). The group is finished.
        CommTimeoutError, PeerLostError: name peer and tag. The group is finished.

    Cost: on one host one copy, by the receiver, of what lies in the arena (a bucket), and two of
    any other tensor, which overlap.
    """
    group = group_of(group)
    dtype = movable("send", "tensor", tensor, group)
    memory = dense(tensor)
    group.send(
        memory.data_ptr(),
        tensor.numel(),
        dtype,
        rank_of("send", "dst", dst, group),
        _tag("send", tag, group),
        shape=tensor.shape,
        place=place_of(memory),
        timeout_s=seconds("send", timeout_s, group),
    )


@shortened
def recv(
    tensor: Tensor,
    src: int | None = None,
    *,
    tag: int = 0,
    group: Group | None = None,
    timeout_s: float | None = None,
) -> int:
    """Overwrite ``tensor`` with the next message of rank ``src``, or of any rank; return whose.

    Args:
        tensor: contiguous; shape and dtype of what is sent.
        src: a rank of the group; None takes the earliest message with this tag that has come.
        tag, group, timeout_s: as for ``send``.

    Raises:
        InvalidArgumentError: also if ``tensor`` is not contiguous or part of an autograd graph.
        MismatchError, CommTimeoutError, PeerLostError: as for ``send``.
    """
    group = group_of(group)
    dtype = _incoming("recv", tensor, group)
    source = group.recv(
        tensor.data_ptr(),
        tensor.numel(),
        dtype,
        _source("recv", src, group),
        _tag("recv", tag, group),
        shape=tensor.shape,
        place=place_of(tensor),
        timeout_s=seconds("recv", timeout_s, group),
    )
    increment_version(tensor)
    return source


def isend(
    tensor: Tensor,
    dst: int,
    *,
    tag: int = 0,
    group: Group | None = None,
    timeout_s: float | None = None,
) -> Work[None]:
    """``send`` that returns at once: leave ``tensor`` alone until ``Work.wait()``.

    Any number may be under way, in any order on the two sides: what nobody receives yet is a
    descriptor there.
    """
    group = group_of(group)
    dtype = movable("isend", "tensor", tensor, group)
    memory = dense(tensor)
    work = group.isend(
        memory.data_ptr(),
        tensor.numel(),
        dtype,
        rank_of("isend", "dst", dst, group),
        _tag("isend", tag, group),
        shape=tensor.shape,
        place=place_of(memory),
        timeout_s=seconds("isend", timeout_s, group),
    )
    return Work(work, memory, nothing)


def irecv(
    tensor: Tensor,
    src: int | None = None,
    *,
    tag: int = 0,
    group: Group | None = None,
    timeout_s: float | None = None,
) -> Work[int]:
    """``recv`` that returns at once; ``tensor`` is valid after ``Work.wait()``, which returns whose
    message it was.
    """
    group = group_of(group)
    dtype = _incoming("irecv", tensor, group)
    work = group.irecv(
        tensor.data_ptr(),
        tensor.numel(),
        dtype,
        _source("irecv", src, group),
        _tag("irecv", tag, group),
        shape=tensor.shape,
        place=place_of(tensor),
        timeout_s=seconds("irecv", timeout_s, group),
    )
    increment_version(tensor)
    return Work(work, tensor, lambda: work.source)


@dataclasses.dataclass(frozen=True)
class P2POp:
    """One ``isend`` or ``irecv`` of ``batch_isend_irecv``.

    Args:
        op: ``pycomm.isend`` or ``pycomm.irecv``.
        tensor: what is sent or overwritten.
        peer: ``dst`` or ``src``.
        group, tag: as for ``send``.
    """

    op: Callable[..., Work[Any]]
    tensor: Tensor
    peer: int | None
    group: Group | None = None
    tag: int = 0


def batch_isend_irecv(p2p_op_list: Sequence[P2POp]) -> list[Work[Any]]:
    """Start all of them; return a ``Work`` for each. No order can make ranks wait for each other.

    Raises:
        InvalidArgumentError: one of them is no P2POp, or what ``isend`` and ``irecv`` raise; those
            before it have been started then.
    """
    for item in p2p_op_list:
        if not isinstance(item, P2POp) or item.op not in (isend, irecv):
            refuse(
                "batch_isend_irecv",
                group_of(item.group if isinstance(item, P2POp) else None),
                f"{item!r} is not a P2POp of pycomm.isend or pycomm.irecv.",
            )
    return [item.op(item.tensor, item.peer, tag=item.tag, group=item.group) for item in p2p_op_list]


def send_object(
    obj: Any,
    dst: int,
    *,
    tag: int = 0,
    group: Group | None = None,
    timeout_s: float | None = None,
) -> None:
    """Send anything ``pickle`` can handle to rank ``dst``, which calls ``recv_object``.

    Unpickling there runs code that the sender chose: ranks trust each other.

    Raises:
        InvalidArgumentError: it cannot be pickled; nothing was sent. Otherwise as for ``send``.
    """
    group = group_of(group)
    try:
        payload = bytearray(pickle.dumps(obj, pickle.HIGHEST_PROTOCOL))
    except Exception as mistake:  # user code inside pickle may raise anything
        raise InvalidArgumentError(
            f"send_object on rank {group.rank}: cannot pickle the object: {mistake!r}"
        ) from mistake
    # Both messages as one: another thread's with the same tag must not come between them.
    length = torch.tensor([len(payload)])
    works = [
        isend(length, dst, tag=tag, group=group, timeout_s=timeout_s),
        isend(
            torch.frombuffer(payload, dtype=torch.uint8),
            dst,
            tag=tag,
            group=group,
            timeout_s=timeout_s,
        ),
    ]
    for work in works:
        work.wait()


def recv_object(
    src: int | None = None,
    *,
    tag: int = 0,
    group: Group | None = None,
    timeout_s: float | None = None,
) -> tuple[Any, int]:
    """The next object that rank ``src``, or any rank, has sent with ``send_object``; and whose.

    Unpickling runs code that the sender chose: ranks trust each other. Give objects a tag of their
    own where several threads of a rank send or receive.

    Raises:
        InvalidArgumentError: it cannot be unpickled here. Otherwise as for ``recv``.
    """
    group = group_of(group)
    length = torch.empty(1, dtype=torch.int64)
    source = recv(length, src, tag=tag, group=group, timeout_s=timeout_s)
    payload = torch.empty(int(length), dtype=torch.uint8)
    recv(payload, source, tag=tag, group=group, timeout_s=timeout_s)
    try:
        return pickle.loads(payload.numpy().tobytes()), source
    except Exception as mistake:
        raise InvalidArgumentError(
            f"recv_object on rank {group.rank}: cannot unpickle what rank {source} sent: "
            f"{mistake!r}"
        ) from mistake


def _incoming(call: str, tensor: Tensor, group: Group) -> DType:
    dtype = movable(call, "tensor", tensor, group)
    writable(call, "tensor", tensor, group)
    if not tensor.is_contiguous():
        refuse(
            call,
            group,
            f"tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()} and is not "
            "contiguous.\n  Receive into tensor.new_empty(tensor.shape) and copy.",
        )
    return dtype


def _source(call: str, src: int | None, group: Group) -> int | None:
    return None if src is None else rank_of(call, "src", src, group)


def _tag(call: str, tag: object, group: Group) -> int:
    number = integer(tag)
    if number is None or not 0 <= number < 1 << 31:
        refuse(call, group, f"tag is {tag!r}. Pass a whole number from 0 to 2147483647.")
    return number
