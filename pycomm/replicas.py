"""Whether the ranks' replicas of a model still are the same, bit by bit."""

from __future__ import annotations

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from pycomm import _core
from pycomm._core import Group
from pycomm.errors import DriftError, InvalidArgumentError
from pycomm.objects import all_gather_bytes, raise_together
from pycomm.runtime import group_of
from pycomm.state import describe, distinct, named_tensors, require_same


def verify_replicas(
    parameters: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    buffers: bool = False,
    group: Group | None = None,
) -> None:
    """Compare every rank's parameters, by checksums of their bits. Changes nothing.

    Args:
        parameters: a module, a ``state_dict()``, or (name, tensor) pairs; same names, order, shapes
            and dtypes on every rank, any strides. What of a module is split over these very ranks
            (see ``tensor_parallel``) is not compared.
        buffers: compare a module's buffers too. Averages of a BatchNorm, for one, differ from rank
            to rank in data parallelism.
        group: the ranks taking part, the world if None; every one of them makes this call.

    Raises:
        DriftError: on every rank, naming the first tensor that differs and the ranks that have
            another one than most; the group stays usable.
        InvalidArgumentError, MismatchError: as for ``broadcast_parameters``; the group stays
            usable.
        CommTimeoutError, PeerLostError: as for ``all_reduce``.

    Cost: one read of the tensors, at 10 GB/s or the speed of memory, and an all-gather of 32
    bytes. Tensors on a GPU are copied to the host, and those with gaps or in another order of
    dimensions are copied, one at a time.
    """
    compare_replicas("verify_replicas", parameters, buffers, group_of(group))


def compare_replicas(
    call: str,
    parameters: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    buffers: bool,
    group: Group,
    when: str = "",
) -> None:
    """``verify_replicas``, called ``call`` in errors, which also say ``when``: on this rank."""
    tensors: dict[str, Tensor] = {}
    mistake = None
    try:
        named = named_tensors(parameters, group)
        if isinstance(parameters, nn.Module) and not buffers:
            own = {id(buffer) for buffer in parameters.buffers()}
            named = [(name, t) for name, t in named if id(t) not in own]
        tensors = distinct(named)
    except InvalidArgumentError as error:
        mistake = error
    raise_together(call, mistake, group)
    described = {name: describe(t) for name, t in tensors.items()}
    mine = [checksum_of(t) for t in tensors.values()]
    payload = struct.pack(f"<{len(mine)}Q", *mine)
    digest = hashlib.sha256(repr(list(described.items())).encode() + payload).digest()
    if len(set(all_gather_bytes(call, digest, group))) == 1:
        return
    require_same(call, described, group)
    payloads = all_gather_bytes(call, payload, group)
    everyones = [struct.unpack(f"<{len(mine)}Q", theirs) for theirs in payloads]
    drifted = [i for i, sums in enumerate(zip(*everyones, strict=True)) if len(set(sums)) > 1]
    first = list(described)[drifted[0]]
    raise DriftError(
        f"{call} on rank {group.rank}{when}: '{first}', {described[first]}, is not the same on all "
        f"ranks: {_sides([sums[drifted[0]] for sums in everyones])}. It is the first of "
        f"{len(drifted)} such tensors among {len(mine)}.\n"
        "  Look for what only some ranks do: a step, a change of a parameter, a seed, another "
        "library. The group stays usable: broadcast_parameters(model) and "
        "broadcast_optimizer_state(optimizer) make them the same again."
    )


def _sides(checksums: Sequence[int]) -> str:
    """Who has the same, most ranks first; of equally many, those with the lowest rank."""
    by_checksum: dict[int, list[int]] = defaultdict(list)
    for rank, checksum in enumerate(checksums):
        by_checksum[checksum].append(rank)
    sides = sorted(by_checksum.values(), key=lambda ranks: (-len(ranks), ranks[0]))
    texts = [
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ({checksums[ranks[0]]:016x})"
        for ranks in sides
    ]
    return f"{texts[0]} against {' and '.join(texts[1:])}"


def checksum_of(tensor: Tensor) -> int:
    """Of the bits of the elements, in the order of their indices."""
    t = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    return _core.checksum(t.data_ptr(), t.numel() * t.element_size())
