"""What a compressor's buckets do instead of an all-reduce: their payloads are all-gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm import _core, device
from pycomm.compression.protocol import Compressor, GradientBucket, described
from pycomm.errors import InvalidArgumentError


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
        self._gradients: list[Tensor] = []
        self._widened: list[Tensor] = []  # the same, as float32
        self._buckets: list[GradientBucket] = []
        self._payloads: dict[int, Tensor] = {}  # by bucket: bytes, a row for each rank
        self._dtypes: dict[int, Any] = {}  # what their compressor made them of

    def place(self, gradients: Sequence[Tensor]) -> None:
        """Say where the buckets lie: a flat tensor each."""
        self._gradients = list(gradients)
        self._widened = [t if t.dtype is torch.float32 else t.float() for t in gradients]
        self._buckets = [
            GradientBucket(
                name=f"bucket {number}",
                values=t if t.is_cuda else t.numpy(),
                divisor=1,
                rank=self._group.rank,
                ranks=self._group.size,
            )
            for number, t in enumerate(self._widened)
        ]

    def launch(self, number: int, divisor: int, name: str) -> _core.Work:
        """Start what brings the other ranks' payloads of a bucket."""
        bucket, gradients = self._buckets[number], self._gradients[number]
        bucket.name, bucket.divisor = name, divisor
        if gradients.is_cuda:
            bucket.stream = device.current_stream(gradients.get_device())
        with self._ending_the_group("compress", bucket):
            if self._widened[number] is not gradients:
                self._widened[number].copy_(gradients)
            payload = self._bytes_of(self._compressor.compress(bucket), bucket, number)
            rows = self._payloads.get(number)
            if rows is None or rows.shape[1] != len(payload):
                rows = self._payloads[number] = payload.new_empty(bucket.ranks, len(payload))
            own = rows.select(0, bucket.rank)
            own.copy_(payload)
        work = self._group.all_gather(
            own.data_ptr(),
            rows.data_ptr(),
            len(payload),
            _core.DType.UINT8,
            name=f"{described(self._compressor)} of {name}",
            place=device.place_of(rows),
            async_op=True,
        )
        assert work is not None
        return work

    def finish(self, number: int) -> None:
        """Write the result into a bucket whose payloads have come."""
        bucket, gradients = self._buckets[number], self._gradients[number]
        rows = self._payloads[number]
        if rows.is_cuda:
            bucket.stream = device.current_stream(rows.get_device())
            payloads = rows.view(self._dtypes[number])
        else:
            payloads = rows.numpy().view(self._dtypes[number])
            payloads.flags.writeable = False
        with self._ending_the_group("decompress", bucket):
            self._compressor.decompress(payloads, bucket)
            if self._widened[number] is not gradients:
                gradients.copy_(self._widened[number])

    def _bytes_of(self, payload: Any, bucket: GradientBucket, number: int) -> Tensor:
        """A payload as bytes; keeps what they are."""
        on_gpu = self._gradients[number].is_cuda
        protocol = "__cuda_array_interface__" if on_gpu else "__array_interface__"
        if isinstance(payload, Tensor) and payload.is_cuda == on_gpu:
            t = payload.detach()
        elif hasattr(payload, protocol):
            t = torch.as_tensor(payload, device=self._gradients[number].device)
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
        self._dtypes[number] = t.dtype if on_gpu else t.numpy().dtype
        return t.view(torch.uint8) if len(t) else t.new_empty(0, dtype=torch.uint8)

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
