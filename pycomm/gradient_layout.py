"""Where each gradient lies: the buckets all ranks agree on, and the parameters' views of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm import _core, device
from pycomm.compressed_exchange import CompressedExchange
from pycomm.compression.protocol import Compressor
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.memory import dense_strides
from pycomm.objects import all_gather_object

# Large enough that what a reduction costs besides its bytes hardly shows, small enough that a model
# has several and all but the last overlap with backward.
DEFAULT_BUCKET_CAP_BYTES = 4 << 20
# Reducing starts as soon as this much is final. A cap below it holds for the first bucket too.
FIRST_BUCKET_CAP_BYTES = 1 << 20

# A little under the 32 MiB from which on glibc maps each block for itself.
_LARGEST_TEMPORARY_BYTES = 31 << 20

# What a gradient is to the core: elements of a dtype, and how many of them make one of its own.
GRADIENT_DTYPES = {
    torch.float16: (_core.DType.FLOAT16, 1),
    torch.bfloat16: (_core.DType.BFLOAT16, 1),
    torch.float32: (_core.DType.FLOAT32, 1),
    torch.float64: (_core.DType.FLOAT64, 1),
    torch.complex64: (_core.DType.FLOAT32, 2),
    torch.complex128: (_core.DType.FLOAT64, 2),
}


# Compressors see float32.
_COMPRESSIBLE = (torch.float16, torch.bfloat16, torch.float32)


class Slot:
    """A parameter and where its gradient lies."""

    __slots__ = (
        "firings",
        "index",
        "kept_grad",
        "last_pass",
        "name",
        "param",
        "pending",
        "private_grad",
        "stream",
        "version",
        "view",
        "waiting",
    )

    def __init__(self, name: str, param: Tensor) -> None:
        self.name = name
        self.param = param
        self.view: Tensor | None = None  # of its bucket; None until it is planned
        self.index = -1  # among the planned parameters
        self.waiting = False  # on a GPU: .grad is to be copied when its bucket is launched
        self.stream = 0  # on which it was computed then
        self.firings = 0  # seen by the pass that records them
        self.pending = False  # .grad holds what no synchronised pass has reduced yet
        self.last_pass = 0  # the last synchronised pass whose result is, or will be, in the view
        self.version = 0  # of the view when that pass was over
        self.private_grad: Tensor | None = None  # .grad of an unused parameter during a pass
        self.kept_grad: Tensor | None = None  # what the last pass gave back because nobody used it


@dataclasses.dataclass(frozen=True)
class _Recording:
    """What a rank brings to the plan: names of trained parameters, indices into them, strides."""

    trained: list[str]
    order: list[int]
    strides: list[tuple[int, ...]]


def lay_out(
    slots: Sequence[Slot],
    order: Sequence[Slot],
    group: _core.Group,
    *,
    bucket_cap_bytes: int,
    overlap: bool,
    algorithm: _core.Algorithm = _core.Algorithm.AUTO,
    compressor: Compressor | None = None,
    measures: bool = False,
) -> tuple[_core.Reducer, _core.HostBuckets | _core.GpuBuckets]:
    """Agree on buckets and give each slot its view of its own. Collective.

    Args:
        slots: the parameters to be reduced, the same on every rank; ``firings`` counted.
        order: those this rank has used, as their gradients arrived. Rank 0's counts, or, if it
            used nothing, that of the first rank that did.
        measures: the buckets, in the host's memory, find what is not finite.

    Returns:
        What reduces the buckets, and what has their memory.

    Raises:
        MismatchError: ranks train different parameters; on every rank.
    """
    for slot in slots:
        check_gradient_dtype(slot.name, slot.param, compressor)  # frozen until now, it may have any
        slot.last_pass = 0
    for index, slot in enumerate(slots):
        slot.index = index
    mine = _Recording(
        trained=[slot.name for slot in slots],
        order=[slot.index for slot in order],
        strides=[dense_strides(slot.param) for slot in slots],
    )
    recordings: list[_Recording] = all_gather_object(mine, group=group)
    _check_same_trained(recordings)
    chosen = next((recording for recording in recordings if recording.order), recordings[0])

    core = [GRADIENT_DTYPES[slot.param.dtype] for slot in slots]
    dtypes = [dtype for dtype, _ in core]
    counts = [slot.param.numel() * scalars for slot, (_, scalars) in zip(slots, core, strict=True)]
    first_bucket_cap_bytes = min(bucket_cap_bytes, FIRST_BUCKET_CAP_BYTES)
    buckets = _core.plan_buckets(
        dtypes, counts, chosen.order, bucket_cap_bytes, first_bucket_cap_bytes
    )
    exchange = None if compressor is None else CompressedExchange(compressor, group)
    store = _store(slots, group, buckets, counts, exchange, measures)
    reducer = _core.Reducer(
        group,
        names=mine.trained,
        dtypes=dtypes,
        counts=counts,
        expected_firings=[max(slot.firings, 1) for slot in slots],
        buckets=buckets,
        store=store,
        overlap=overlap,
        algorithm=algorithm,
    )
    _keep_heap()
    for number, bucket in enumerate(buckets):
        memory = store.memory(number)
        if exchange is not None:
            dtype = slots[bucket.parameters[0]].param.dtype
            exchange.place(_flat(memory, 0, dtype, bucket.flags_offset))
        for index, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            param = slots[index].param
            offset_bytes = offset * param.element_size() // core[index][1]
            slots[index].view = _view(memory, offset_bytes, param, chosen.strides[index])
    return reducer, store


def _keep_heap() -> None:
    """Let the C library keep the memory of gradients that have been copied into their bucket.

    Freed one by one while backward goes on, they would make glibc give the end of the heap back to
    the kernel and fetch it anew, thousands of page faults in each step. It stops when it has seen
    blocks of megabytes come and go: the largest one freed so far, up to 32 MiB, is what it then
    takes for temporary (M_MMAP_THRESHOLD in mallopt(3)). The block itself costs no memory, as
    nothing is written; the heap then keeps up to twice its size of what is freed
    (M_TRIM_THRESHOLD).
    """
    torch.empty(_LARGEST_TEMPORARY_BYTES, dtype=torch.uint8)


def check_gradient_dtype(name: str, param: Tensor, compressor: Compressor | None) -> None:
    allowed = GRADIENT_DTYPES if compressor is None else _COMPRESSIBLE
    if param.dtype not in allowed:
        done = "reduced as" if compressor is None else "compressed from"
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InvalidArgumentError(
            f"parameter '{name}' is {param.dtype}, and gradients are {done} {supported}.\n"
            "  Convert or freeze it."
        )


def _check_same_trained(recordings: list[_Recording]) -> None:
    for rank, recording in enumerate(recordings):
        difference = set(recording.trained) ^ set(recordings[0].trained)
        if difference:
            name = min(difference)
            trained, frozen = (rank, 0) if name in recording.trained else (0, rank)
            raise MismatchError(
                f"parameter '{name}' requires a gradient on rank {trained} and is frozen on "
                f"rank {frozen}.\n  Freeze and unfreeze the same parameters on every rank.",
                group_usable=True,
            )


def _store(
    slots: Sequence[Slot],
    group: _core.Group,
    buckets: Sequence[_core.Bucket],
    counts: Sequence[int],
    exchange: CompressedExchange | None,
    measures: bool,
) -> _core.HostBuckets | _core.GpuBuckets:
    """Memory for the buckets, where the parameters are."""
    place = device.place_of(slots[0].param) if slots else None
    functions = None if exchange is None else (exchange.launch, exchange.finish)
    if place is None:
        return _core.HostBuckets(group, buckets, counts, functions, measures)
    assert not measures  # refused by OwnedParameters
    return _core.GpuBuckets(group, buckets, counts, *place, functions)


def _view(
    memory: _core.Buffer | _core.DeviceMemory,
    offset_bytes: int,
    param: Tensor,
    strides: tuple[int, ...],
) -> Tensor:
    """A gradient-to-be; it keeps the bucket's memory alive, and counts its versions alone."""
    if param.numel() == 0:
        return torch.empty_like(param, requires_grad=False)
    flat = _flat(memory, offset_bytes, param.dtype, param.numel())
    return flat.as_strided(param.shape, strides)


def _flat(
    memory: _core.Buffer | _core.DeviceMemory, offset_bytes: int, dtype: torch.dtype, count: int
) -> Tensor:
    """Some of a bucket's elements."""
    if count == 0:  # an empty view is of no memory
        where = "cpu" if isinstance(memory, _core.Buffer) else f"cuda:{memory.device}"
        return torch.empty(0, dtype=dtype, device=where)
    if isinstance(memory, _core.Buffer):
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset_bytes)
    nbytes = count * dtype.itemsize
    return device.bytes_of(memory).narrow(0, offset_bytes, nbytes).view(dtype)
