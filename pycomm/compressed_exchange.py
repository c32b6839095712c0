"""What a compressor's buckets do instead of an all-reduce: their payloads are all-gathered."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pycomm import _core, device
from pycomm.compression.protocol import Compressor, GradientBucket, described
from pycomm.errors import InvalidArgumentError


@dataclasses.dataclass
class _Part:
    """A bucket, and what of it travels."""

    gradients: Tensor
    widened: Tensor  # the same, as float32
    bucket: GradientBucket
    payloads: Tensor = dataclasses.field(init=False)  # bytes, a row for each rank
    dtype: Any = None  # what their compressor made them of

    def __post_init__(self) -> None:
        self.payloads = self.gradients.new_empty(self.bucket.ranks, 0, dtype=torch.uint8)

    def take(self, payload: Any) -> Tensor:
        """Copy this rank's payload, an array, into its row, which is returned."""
        on_gpu = self.gradients.is_cuda
        protocol = "__cuda_array_interface__" if on_gpu else "__array_interface__"
        if isinstance(payload, Tensor) and payload.is_cuda == on_gpu:
            t = payload.detach()
        elif hasattr(payload, protocol):
            t = torch.as_tensor(payload, device=self.gradients.device)
        else:
            kind = "CUDA array" if on_gpu else "NumPy array"
            raise InvalidArgumentError(
                f"it returned a {type(payload).__name__}, which is no {kind}.\n"
                f"  Return a {kind} of one dimension."
            )
        if t.dim() != 1 or not t.is_contiguous():
            raise InvalidArgumentError(
                f"it returned an array of shape {tuple(t.shape)} and strides {t.stride()}.\n"
                "  Return a contiguous one of one dimension."
            )
        self.dtype = t.dtype if on_gpu else t.numpy().dtype
        t = t.view(torch.uint8) if len(t) else t.new_empty(0, dtype=torch.uint8)
        if self.payloads.shape[1] != len(t):
            self.payloads = t.new_empty(self.bucket.ranks, len(t))
        own = self.payloads.select(0, self.bucket.rank)
        own.copy_(t)
        return own


class CompressedExchange:
    """The exchange of a reducer's buckets (``_core.HostBuckets``, ``_core.GpuBuckets``).

    ``launch`` compresses a bucket and starts the all-gather of the ranks' payloads; once that is
    over, ``finish`` lets the compressor write what they come to into the bucket. Every rank folds
    all payloads in rank order, so all have the same bits.

    Cost for ``p`` ranks and payloads of ``m`` bytes: each rank receives (p-1) m bytes and
    decompresses p m. So it pays on slow wires and with few ranks: a ring all-reduce of n bytes
    receives 2 (p-1)/p n, which is less as soon as p m exceeds 2 n.
    """

    def __init__(self, compressor: Compressor, group: _core.Group) -> None:
        self._compressor = compressor
        self._group = group
        self._parts: list[_Part] = []  # by bucket

    def place(self, gradients: Tensor) -> None:
        """Say where the next bucket lies: a flat tensor."""
        widened = gradients if gradients.dtype is torch.float32 else gradients.float()
        bucket = GradientBucket(
            name=f"bucket {len(self._parts)}",
            values=widened if widened.is_cuda else widened.numpy(),
            divisor=1,
            rank=self._group.rank,
            ranks=self._group.size,
        )
        self._parts.append(_Part(gradients, widened, bucket))

    def launch(self, number: int, divisor: int, name: str) -> _core.Work:
        """Start what brings the other ranks' payloads of a bucket."""
        part = self._parts[number]
        bucket = part.bucket
        bucket.name, bucket.divisor = name, divisor
        if part.gradients.is_cuda:
            bucket.stream = device.current_stream(part.gradients.get_device())
        with self._ending_the_group("compress", bucket):
            if part.widened is not part.gradients:
                part.widened.copy_(part.gradients)
            own = part.take(self._compressor.compress(bucket))
        work = self._group.all_gather(
            own.data_ptr(),
            part.payloads.data_ptr(),
            len(own),
            _core.DType.UINT8,
            name=f"{described(self._compressor)} of {name}",
            place=device.place_of(part.payloads),
            async_op=True,
        )
        assert work is not None
        return work

    def finish(self, number: int) -> None:
        """Write the result into a bucket whose payloads have come."""
        part = self._parts[number]
        if part.payloads.is_cuda:
            part.bucket.stream = device.current_stream(part.payloads.get_device())
            payloads = part.payloads.view(part.dtype)
        else:
            payloads = part.payloads.numpy().view(part.dtype)
            payloads.flags.writeable = False
        with self._ending_the_group("decompress", part.bucket):
            self._compressor.decompress(payloads, part.bucket)
            if part.widened is not part.gradients:
                part.gradients.copy_(part.widened)

    @contextlib.contextmanager
    def _ending_the_group(self, method: str, bucket: GradientBucket) -> Iterator[None]:
        """The others wait for this rank: let them know what it raises."""
        try:
            yield
        except BaseException as error:  # Ctrl-C too: the rank may live on
            self._group.abort(
                f"rank {bucket.rank}: {described(self._compressor)}.{method}() of {bucket.name} "
                f"raised {type(error).__name__}: {error}"
            )
            raise
