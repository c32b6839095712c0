"""Blocks of 256 elements, which are compressed each by itself, and payloads made of several arrays.

The arrays are NumPy's, or on a GPU torch's.
"""

import numpy as np
import torch

from pycomm.compression.protocol import Array, GradientBucket

BLOCK = 256
_ALIGNMENT = 16  # of every array in a payload


def block_count(count: int) -> int:
    return -(-count // BLOCK)


def residual_of(bucket: GradientBucket) -> Array:
    """What has not been sent yet, flat; zeros at first. Whole blocks, where the values are."""
    if "residual" not in bucket.memory:
        count = block_count(len(bucket.values)) * BLOCK
        on_gpu = isinstance(bucket.values, torch.Tensor)
        zeros = bucket.values.new_zeros(count) if on_gpu else np.zeros(count, np.float32)
        bucket.memory["residual"] = zeros
    return bucket.memory["residual"]


def corrected(bucket: GradientBucket) -> Array:
    """Gradients and residual together, on the host: shape ``(blocks, 256)``."""
    total = residual_of(bucket).copy()
    total[: len(bucket.values)] += bucket.values
    return total.reshape(-1, BLOCK)


def payload_like(values: Array, *parts: tuple[str, int]) -> Array:
    """Room for arrays of these dtypes and counts, end to end, as bytes where ``values`` are."""
    nbytes = sum(bytes_of(*part) for part in parts)
    if isinstance(values, torch.Tensor):
        return values.new_zeros(nbytes, dtype=torch.uint8)
    return np.zeros(nbytes, np.uint8)


def parts_of(payload: Array, *parts: tuple[str, int]) -> list[Array]:
    """Views of them; of several payloads at once if it has a dimension for them."""
    views, begin = [], 0
    for dtype, count in parts:
        nbytes = np.dtype(dtype).itemsize * count
        views.append(as_dtype(payload[..., begin : begin + nbytes], dtype))
        begin += bytes_of(dtype, count)
    return views


def as_dtype(array: Array, dtype: str) -> Array:
    """A view of the same bytes."""
    return array.view(getattr(torch, dtype) if isinstance(array, torch.Tensor) else np.dtype(dtype))


def bytes_of(dtype: str, count: int) -> int:
    """What an array takes in a payload."""
    return -(-np.dtype(dtype).itemsize * count // _ALIGNMENT) * _ALIGNMENT
