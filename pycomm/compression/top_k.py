"""The largest elements of each block, and nothing else."""

import dataclasses

import numpy as np

from pycomm.compression.blocks import (
    BLOCK,
    block_count,
    bytes_of,
    corrected,
    parts_of,
    payload_like,
    residual_of,
)
from pycomm.compression.protocol import Array, GradientBucket
from pycomm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class TopK:
    """Sends of each block of 256 elements the ``k`` with the largest magnitudes, as float32.

    ``k`` is ``256 * ratio``, rounded, at least 1: 5 bytes for each of them instead of 1024 for the
    block, so 68 times less at the default. The others are kept and added to the next step's
    gradient (error feedback). Of equal magnitudes the one before goes first; an infinity or a NaN
    goes before any number, and what of them does not fit is dropped.

    Choosing in blocks rather than among all elements needs one pass, takes the same from every
    part of the model, and gives every rank a payload of one length.

    Args:
        ratio: of the elements, in (0, 1].

    Source: Stich, Cordonnier & Jaggi, "Sparsified SGD with memory" (NeurIPS 2018).
    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise InvalidArgumentError(
                f"TopK: ratio is {self.ratio!r}. Pass the part of the elements to send, a number "
                "above 0 and up to 1."
            )

    @property
    def k(self) -> int:
        """Elements of each block."""
        return max(1, round(BLOCK * self.ratio))

    def compress(self, bucket: GradientBucket) -> Array:
        parts = self._parts(len(bucket.values))
        payload = payload_like(bucket.values, *parts)
        chosen, places = parts_of(payload, *parts)
        residual = residual_of(bucket)
        if bucket.stream is not None:
            from pycomm.compression import cuda

            cuda.choose(bucket, residual, chosen, places, self.k)
            return payload
        blocks = corrected(bucket)
        magnitudes = np.abs(blocks)
        magnitudes[np.isnan(magnitudes)] = np.inf
        order = np.argsort(-magnitudes, axis=1, kind="stable")[:, : self.k]
        chosen[:] = np.take_along_axis(blocks, order, axis=1).ravel()
        places[:] = order.ravel()
        np.put_along_axis(blocks, order, 0, axis=1)
        residual[:] = np.where(np.isfinite(blocks), blocks, 0).ravel()
        return payload

    def decompress(self, payloads: Array, bucket: GradientBucket) -> None:
        count = len(bucket.values)
        if bucket.stream is not None:
            from pycomm.compression import cuda

            cuda.sum_chosen(payloads, bytes_of(*self._parts(count)[0]), bucket, self.k)
            return
        chosen, places = parts_of(payloads, *self._parts(count))
        total = np.zeros((block_count(count), BLOCK), np.float32)
        rows = np.arange(len(total))[:, None]
        for rank in range(bucket.ranks):
            # A payload names each place of a block once.
            total[rows, places[rank].reshape(-1, self.k)] += chosen[rank].reshape(-1, self.k)
        np.divide(total.ravel()[:count], np.float32(bucket.divisor), out=bucket.values)

    def _parts(self, count: int) -> tuple[tuple[str, int], tuple[str, int]]:
        chosen = block_count(count) * self.k
        return ("float32", chosen), ("uint8", chosen)
