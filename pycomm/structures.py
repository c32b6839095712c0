"""Objects with tensors in them, such as a ``state_dict``: the tensors travel as tensors."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycomm import device
from pycomm._core import Group
from pycomm.arguments import MOVABLE
from pycomm.collectives import broadcast_
from pycomm.errors import InvalidArgumentError
from pycomm.objects import broadcast_bytes, broadcast_object, raise_together


def broadcast_structure(call: str, make: Callable[[], Any], root: int, group: Group) -> Any:
    """What ``make()`` returns on ``root``, on every rank. On the others its tensors are new ones.

    Args:
        make: called on the root alone.

    Raises:
        InvalidArgumentError: on every rank, if the root's ``make`` raises, or what it returns
            cannot be sent or unpickled; the group stays usable.
        MismatchError, CommTimeoutError, PeerLostError: as for ``all_reduce``.
    """
    structure = b""
    tensors: list[Tensor] = []
    made: Any = None
    mistake: Exception | None = None
    if group.rank == root:
        try:
            made = make()
            structure, tensors = _take_apart(made)
        except Exception as error:  # whatever a state's own pickling raises
            mistake = error
    raise_together(call, mistake, group)
    structure = broadcast_bytes(call, structure, root, group)
    layouts = broadcast_object([_layout(t) for t in tensors], root, group=group)
    if group.rank != root:
        tensors = [
            torch.empty_strided(*sizes, dtype=dtype, device=device.like_remote(kind))
            for *sizes, dtype, kind in layouts
        ]
    for tensor in tensors:
        broadcast_(tensor, root, group=group)
    if group.rank != root:
        try:
            made = _TensorsBack(io.BytesIO(structure), tensors).load()
        except Exception as error:  # likewise
            mistake = error
    raise_together(call, mistake, group)
    return made


def is_movable(tensor: Tensor) -> bool:
    """Whether it can be sent as it is."""
    return device.supported(tensor) and tensor.layout is torch.strided and tensor.dtype in MOVABLE


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, str]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type


class _TensorsApart(pickle.Pickler):
    """Pickles an object but for its tensors, which are collected; one seen twice is kept once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._place: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._place:
            self._place[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._place[id(obj)]


class _TensorsBack(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def _take_apart(obj: Any) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _TensorsApart(file)
    pickler.dump(obj)
    for tensor in pickler.tensors:
        if not is_movable(tensor):
            raise InvalidArgumentError(
                f"the state holds a {tensor.dtype} tensor on {tensor.device} with layout "
                f"{tensor.layout}, and pycomm moves dense CPU and CUDA tensors only."
            )
    # Strides are kept where the elements fill their memory (channels-last), as torch.clone does.
    tensors = [t.detach() for t in pickler.tensors]
    dense = [t if t.is_contiguous() else torch.empty_like(t).copy_(t) for t in tensors]
    return file.getvalue(), dense
