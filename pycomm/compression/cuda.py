"""The compressors' CUDA kernels, in Numba. No GPU has run them: see docs/gpu-status.md.

A thread block takes a block of 256 elements, a thread each. Everything is put on the bucket's
stream; nothing waits.
"""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from pycomm.compression.blocks import BLOCK, as_dtype, block_count, parts_of, payload_like
from pycomm.compression.protocol import Array, GradientBucket
from pycomm.errors import CommError

try:
    numba = importlib.import_module("numba")
    cuda = importlib.import_module("numba.cuda")
except ImportError as error:
    raise CommError(
        f"gradients on a GPU are compressed by kernels in Numba, which cannot be imported: {error}"
        ".\n  pip install 'pycomm-torch[compress]'"
    ) from error

Function = TypeVar("Function", bound=Callable[..., None])

f4: Any = np.float32
# Added and taken away, it rounds a float32 below 2**22 to the nearest whole number, ties to even.
ROUND = f4(1.5 * 2**23)
LARGEST_INT8 = f4(127)
LARGEST_FLOAT16 = f4(65504)


def to_float16(bucket: GradientBucket) -> Array:
    part = ("float16", len(bucket.values))
    halves = parts_of(payload_like(bucket.values, part), part)[0]
    _start(_to_float16, bucket, halves, bucket.values)
    return halves


def sum_float16(payloads: Array, bucket: GradientBucket) -> None:
    _start(_sum_float16, bucket, bucket.values, payloads, f4(bucket.divisor))


def quantize(bucket: GradientBucket, residual: Array, scales: Array, codes: Array) -> None:
    _start(_quantize, bucket, scales, codes, residual, bucket.values)


def sum_quantized(payloads: Array, codes_begin: int, bucket: GradientBucket) -> None:
    scales, codes = as_dtype(payloads, "float32"), as_dtype(payloads, "int8")
    _start(_sum_quantized, bucket, bucket.values, scales, codes, codes_begin, f4(bucket.divisor))


def choose(bucket: GradientBucket, residual: Array, chosen: Array, places: Array, k: int) -> None:
    _start(_choose, bucket, chosen, places, residual, bucket.values, k)


def sum_chosen(payloads: Array, places_begin: int, bucket: GradientBucket, k: int) -> None:
    chosen = as_dtype(payloads, "float32")
    divisor = f4(bucket.divisor)
    _start(_sum_chosen, bucket, bucket.values, chosen, payloads, places_begin, divisor, k)


def _start(kernel: Any, bucket: GradientBucket, *arguments: Any) -> None:
    blocks = block_count(len(bucket.values))
    if blocks > 0:
        stream = cuda.external_stream(bucket.stream) if bucket.stream else 0  # CUDA's default
        kernel[blocks, BLOCK, stream](*arguments)


def _kernel(function: Function) -> Function:
    return cast("Function", cuda.jit(function))


@_kernel
def _to_float16(halves: Any, values: Any) -> None:
    i = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    if i < len(values):
        value = values[i]
        if value - value == 0:  # finite
            value = min(max(value, -LARGEST_FLOAT16), LARGEST_FLOAT16)
        halves[i] = value


@_kernel
def _sum_float16(values: Any, payloads: Any, divisor: Any) -> None:
    i = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    if i < len(values):
        total = f4(payloads[0, i])
        for rank in range(1, payloads.shape[0]):
            total += f4(payloads[rank, i])
        values[i] = total / divisor


@_kernel
def _quantize(scales: Any, codes: Any, residual: Any, values: Any) -> None:
    magnitudes = cuda.shared.array(BLOCK, numba.float32)
    thread = cuda.threadIdx.x
    i = cuda.blockIdx.x * BLOCK + thread
    value = residual[i]
    if i < len(values):
        value += values[i]
    magnitudes[thread] = abs(value)
    cuda.syncthreads()
    reach = BLOCK // 2
    while reach > 0:
        if thread < reach:
            other = magnitudes[thread + reach]
            if other > magnitudes[thread] or other != other:  # a NaN wins
                magnitudes[thread] = other
        cuda.syncthreads()
        reach //= 2
    scale = f4(magnitudes[0] / LARGEST_INT8)
    finite = scale - scale == 0
    quotient = f4(0)
    if finite and scale > 0:
        quotient = f4(f4(value / scale) + ROUND) - ROUND
        quotient = min(max(quotient, -LARGEST_INT8), LARGEST_INT8)
    codes[i] = quotient
    residual[i] = value - f4(quotient * scale) if finite else f4(0)
    if thread == 0:
        scales[cuda.blockIdx.x] = scale


@_kernel
def _sum_quantized(values: Any, scales: Any, codes: Any, codes_begin: int, divisor: Any) -> None:
    i = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    if i < len(values):
        total = f4(0)
        for rank in range(scales.shape[0]):
            total += f4(codes[rank, codes_begin + i]) * scales[rank, cuda.blockIdx.x]
        values[i] = total / divisor


@_kernel
def _choose(chosen: Any, places: Any, residual: Any, values: Any, k: int) -> None:
    magnitudes = cuda.shared.array(BLOCK, numba.float32)
    thread = cuda.threadIdx.x
    i = cuda.blockIdx.x * BLOCK + thread
    value = residual[i]
    if i < len(values):
        value += values[i]
    own = abs(value)
    if own != own:
        own = f4(np.inf)
    magnitudes[thread] = own
    cuda.syncthreads()
    larger = 0  # elements that go first
    for other in range(BLOCK):
        magnitude = magnitudes[other]
        if magnitude > own or (magnitude == own and other < thread):
            larger += 1
    if larger < k:
        chosen[cuda.blockIdx.x * k + larger] = value
        places[cuda.blockIdx.x * k + larger] = thread
        residual[i] = 0
    else:
        residual[i] = value if value - value == 0 else f4(0)


@_kernel
def _sum_chosen(
    values: Any, chosen: Any, places: Any, places_begin: int, divisor: Any, k: int
) -> None:
    totals = cuda.shared.array(BLOCK, numba.float32)
    thread = cuda.threadIdx.x
    i = cuda.blockIdx.x * BLOCK + thread
    totals[thread] = 0
    cuda.syncthreads()
    for rank in range(chosen.shape[0]):
        if thread < k:  # a payload names each place of a block once
            at = cuda.blockIdx.x * k + thread
            totals[places[rank, places_begin + at]] += chosen[rank, at]
        cuda.syncthreads()
    if i < len(values):
        values[i] = totals[thread] / divisor
