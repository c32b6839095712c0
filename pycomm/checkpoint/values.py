"""Values as bytes that torch loads with ``weights_only=True``, which runs no code of theirs."""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pycomm.checkpoint.contents import ValueEntry
from pycomm.checkpoint.reason import reason_of
from pycomm.errors import InvalidArgumentError


def entry_of(name: str, value: Any, *, ranks_may_differ: bool = False) -> ValueEntry:
    """A value ready to be written.

    Raises:
        InvalidArgumentError: it could not be loaded again.
    """
    return ValueEntry(name, encoded(name, value), None if ranks_may_differ else digest(value))


def encoded(name: str, value: Any) -> bytes:
    """As bytes, which ``decoded`` was seen to take.

    Raises:
        InvalidArgumentError: it is of a type that ``weights_only=True`` refuses.
    """
    file = io.BytesIO()
    try:
        torch.save(without_memory(value), file)
        decoded(file.getvalue())
    except Exception as error:  # whatever its own pickling raises
        raise InvalidArgumentError(
            f"'{name}' is a {type(value).__name__} that cannot be saved: {reason_of(error)}.\n"
            "  Convert it to tensors, Python's numbers, strings, lists and dicts: a number of "
            "numpy with float(x) or int(x), an array with torch.from_numpy(x). Or allow its type "
            "with torch.serialization.add_safe_globals() in every process that saves or loads it."
        ) from error
    return file.getvalue()


def decoded(payload: bytes) -> Any:
    """The value; its tensors are on the CPU."""
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def digest(value: Any) -> str:
    """Equal for equal values, whichever of their parts are one object."""
    leaves, spec = pytree.tree_flatten(value)
    hashed = hashlib.sha256(repr(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            dense = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
            hashed.update(f"tensor {dense.dtype} {tuple(dense.shape)}".encode())
            hashed.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, (str, int, float, complex, bool, type(None))):
            hashed.update(f"{type(leaf).__name__} {leaf!r};".encode())
        else:
            hashed.update(pickle.dumps(leaf))
    return hashed.hexdigest()


def without_memory(value: Any) -> Any:
    """Its tensors on the CPU, and none a view of more memory than it fills."""
    return pytree.tree_map_only(Tensor, _own_memory, value)


def _own_memory(tensor: Tensor) -> Tensor:
    """On the CPU, without what else lies in the memory that it is a view of."""
    tensor = tensor.detach().cpu()
    if tensor.layout is torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
        return tensor.clone()
    return tensor
