"""What a compressor is, and what it is given."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

# A NumPy array, or on a GPU a torch tensor there: CuPy and Numba take it as it is, through its
# __cuda_array_interface__.
Array = Any


@dataclasses.dataclass
class GradientBucket:
    """Gradients that are exchanged together, as a compressor sees them. One each, for good.

    Attributes:
        name: for errors: the backward pass and the first parameters.
        values: shape ``(n,)``, float32 (16-bit gradients are widened before and rounded after);
            contiguous. This rank's gradients for ``compress``, which may overwrite them; the result
            of ``decompress``. Gaps between parameters are zero.
        divisor: what the ranks' sum is to be divided by: the number of ranks for AVG, 1 for SUM.
        rank, ranks: this rank and their number.
        memory: whatever the compressor keeps from one step to the next, such as what it has not
            sent yet. Empty at first, and again whenever buckets are laid out anew.
        stream: on a GPU the address of the CUDA stream that all work has to be put on, without
            waiting for it; None on the host.
    """

    name: str
    values: Array
    divisor: int
    rank: int
    ranks: int
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    stream: int | None = None


class Compressor(Protocol):
    """Turns a bucket into what travels, and what has come back into gradients.

    Every rank has one with the same arguments; the ``repr`` says them, where it is defined, and is
    compared. ``compress`` is called by the thread that computes gradients (on a GPU autograd's
    own), ``decompress`` by the one that calls ``backward()``, in the same order on every rank; in
    a group of one rank neither is. Whatever one raises is raised by ``backward()``, and ends the
    group on the other ranks (docs/compression.md says when they hear of it).
    """

    def compress(self, bucket: GradientBucket) -> Array:
        """This rank's part of what all ranks receive.

        Returns:
            A contiguous array of one dimension, of the same length and dtype on every rank (another
            length is a ``MismatchError``), copied before the next call. On a GPU one with
            ``__cuda_array_interface__``.
        """

    def decompress(self, payloads: Array, bucket: GradientBucket) -> None:
        """Write the ranks' sum, divided by ``bucket.divisor``, into ``bucket.values``.

        The same bits on every rank: fold the payloads in their order, and depend on nothing else.

        Args:
            payloads: shape ``(ranks, length)``: what ``compress`` has returned on each; read only.
        """


def described(compressor: object) -> str:
    """What all ranks must have in common, for errors."""
    if type(compressor).__repr__ is object.__repr__:  # that is an address
        return f"{type(compressor).__module__}.{type(compressor).__qualname__}"
    return repr(compressor)
