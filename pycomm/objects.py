"""Python objects between ranks, as pickles.

Unpickling runs code that the sender chose: ranks trust each other. What one rank cannot pickle or
unpickle raises on every rank, so that none is left waiting.
"""

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pycomm._core import Group
from pycomm.arguments import MOVABLE, root_rank
from pycomm.collectives import all_to_all, gather_list
from pycomm.errors import CommError, InvalidArgumentError
from pycomm.runtime import group_of

T = TypeVar("T")


def broadcast_object(obj: Any, root: int = 0, *, group: Group | None = None) -> Any:
    """``root``'s ``obj``, on every rank. On the root it is ``obj`` itself, elsewhere a copy.

    Args:
        obj: anything ``pickle`` can handle; ignored on the other ranks. Unpickling runs code that
            the root chose, so use it only among ranks that trust each other.
        root: a rank of the group.
        group: the ranks taking part, the world if None; every one of them makes this call.

    Raises:
        InvalidArgumentError: on every rank, if the root cannot pickle the object or a rank cannot
            unpickle it; the group stays usable.
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``.

    Cost: three small messages and one of the pickle's size; no rank holds more than one copy.
    """
    group = group_of(group)
    root = root_rank("broadcast_object", root, group)
    payload, mistake = b"", None
    if group.rank == root:
        payload, mistake = _attempt(lambda: pickle.dumps(obj, pickle.HIGHEST_PROTOCOL), b"")
    raise_together("broadcast_object", mistake, group)
    payload = broadcast_bytes("broadcast_object", payload, root, group)
    mistake = None
    if group.rank != root:
        obj, mistake = _attempt(lambda: pickle.loads(payload), None)
    raise_together("broadcast_object", mistake, group)
    return obj


def all_gather_object(obj: Any, *, group: Group | None = None) -> list[Any]:
    """Every rank's ``obj``, by rank. This rank's own place holds a copy as well.

    Args:
        obj: anything ``pickle`` can handle, of any size, different on each rank. Unpickling runs
            code that the other ranks chose, so use it only among ranks that trust each other.
        group: the ranks taking part, the world if None; every one of them makes this call.

    Raises:
        InvalidArgumentError: on every rank, if one cannot pickle its object or unpickle another's;
            the group stays usable.
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``.

    Memory: ``p`` times the largest pickle.
    """
    group = group_of(group)
    payload, mistake = _attempt(lambda: pickle.dumps(obj, pickle.HIGHEST_PROTOCOL), b"")
    raise_together("all_gather_object", mistake, group)
    payloads = all_gather_bytes("all_gather_object", payload, group)
    objects: list[Any]
    objects, mistake = _attempt(lambda: [pickle.loads(theirs) for theirs in payloads], [])
    raise_together("all_gather_object", mistake, group)
    return objects


def gather_object(obj: Any, root: int = 0, *, group: Group | None = None) -> list[Any] | None:
    """Every rank's ``obj``, by rank, on ``root``; None on the others.

    Args:
        obj: as for ``all_gather_object``. Unpickling runs code that the other ranks chose, so use
            it only among ranks that trust each other.
        root: a rank of the group.
        group: the ranks taking part, the world if None; every one of them makes this call.

    Raises:
        InvalidArgumentError: on every rank, if one cannot pickle its object or the root cannot
            unpickle it; the group stays usable.
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``.

    Memory: on the root the sum of all pickles, elsewhere its own.
    """
    group = group_of(group)
    root = root_rank("gather_object", root, group)
    payload, mistake = _attempt(lambda: pickle.dumps(obj, pickle.HIGHEST_PROTOCOL), b"")
    raise_together("gather_object", mistake, group)
    payloads = gather_list(_tensor_of(payload), root, group=group)
    objects: list[Any] | None = None
    mistake = None
    if payloads is not None:
        objects, mistake = _attempt(
            lambda: [pickle.loads(theirs.numpy().tobytes()) for theirs in payloads], None
        )
    raise_together("gather_object", mistake, group)
    return objects


def scatter_object(
    objects: Sequence[Any] | None, root: int = 0, *, group: Group | None = None
) -> Any:
    """``root``'s ``objects[r]``, on rank ``r``. The root's own is a copy as well.

    Args:
        objects: on the root one for each rank, anything ``pickle`` can handle; ignored elsewhere.
            Unpickling runs code that the root chose, so use it only among ranks that trust each
            other.
        root: a rank of the group.
        group: the ranks taking part, the world if None; every one of them makes this call.

    Raises:
        InvalidArgumentError: on every rank, if ``objects`` are not one for each rank, the root
            cannot pickle them, or a rank cannot unpickle its own; the group stays usable.
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``.

    Memory: on the root the sum of all pickles, elsewhere its own.
    """
    group = group_of(group)
    root = root_rank("scatter_object", root, group)
    payloads: list[bytes] = [b""] * group.size
    mistake: Exception | None = None
    if group.rank == root:
        payloads, mistake = _attempt(lambda: _pickled(objects, group.size), payloads)
    raise_together("scatter_object", mistake, group)
    lengths = [len(payload) for payload in payloads]
    data = _tensor_of(b"".join(payloads))
    mine = all_to_all(data, lengths, group=group).numpy().tobytes()
    obj, mistake = _attempt(lambda: pickle.loads(mine), None)
    raise_together("scatter_object", mistake, group)
    return obj


def raise_together(call: str, mistake: Exception | None, group: Group) -> None:
    """Raise on every rank if any has made a mistake, naming the first one that has.

    Every rank calls this, with None if all is well there: one all-gather of a number then.
    """
    text = "" if mistake is None else f"{type(mistake).__name__}: {mistake}"
    mine = text.encode(errors="backslashreplace")  # a file's name may hold any bytes
    for rank, theirs in enumerate(all_gather_bytes(call, mine, group)):
        if theirs:
            raise InvalidArgumentError(
                f"{call} on rank {group.rank}: failed on rank {rank}: {theirs.decode()}"
            ) from mistake


# The public call is the name of the operations below, and every call begins with one of them, so
# that two different calls never take each other's bytes: the ranks get a MismatchError that names
# both.


def broadcast_bytes(call: str, payload: bytes, root: int, group: Group) -> bytes:
    """``root``'s bytes, on every rank; what the others pass is ignored."""
    length = torch.tensor(len(payload))
    _broadcast(call, length, root, group)
    if group.rank == root:
        _broadcast(call, _tensor_of(payload), root, group)
        return payload
    data = torch.empty(int(length), dtype=torch.uint8)
    _broadcast(call, data, root, group)
    return data.numpy().tobytes()


def all_gather_bytes(call: str, payload: bytes, group: Group) -> list[bytes]:
    """Every rank's bytes, by rank; their lengths may differ."""
    lengths = _all_gather(call, torch.tensor([len(payload)]), group).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    if not len(padded):
        return [b""] * group.size
    padded[: len(payload)] = _tensor_of(payload)
    rows = _all_gather(call, padded, group)
    return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]


def _broadcast(call: str, t: Tensor, root: int, group: Group) -> None:
    group.broadcast(t.data_ptr(), t.data_ptr(), t.numel(), MOVABLE[t.dtype], root, name=call)


def _all_gather(call: str, t: Tensor, group: Group) -> Tensor:
    rows = torch.empty(group.size, t.numel(), dtype=t.dtype)
    group.all_gather(t.data_ptr(), rows.data_ptr(), t.numel(), MOVABLE[t.dtype], name=call)
    return rows


def _tensor_of(payload: bytes) -> Tensor:
    if not payload:  # frombuffer refuses
        return torch.empty(0, dtype=torch.uint8)
    # A bytearray, because torch warns about memory that it must not write.
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _pickled(objects: Sequence[Any] | None, count: int) -> list[bytes]:
    if objects is None or len(objects) != count:
        given = "None" if objects is None else f"{len(objects)} objects"
        raise ValueError(f"the root passed {given} for {count} ranks. Pass one for each rank.")
    return [pickle.dumps(obj, pickle.HIGHEST_PROTOCOL) for obj in objects]


def _attempt(action: Callable[[], T], otherwise: T) -> tuple[T, Exception | None]:
    """What ``action`` returns, or what it raised: user code inside pickle may raise anything."""
    try:
        return action(), None
    except CommError:
        raise
    except Exception as mistake:
        return otherwise, mistake
