"""Tensors packed by dtype and device, so that one operation moves many of them.

The tensors of a dtype and device are laid end to end, moved together, and cut apart again. The
operation's name lists their shapes, so that its signature covers them all: ranks whose lists differ
get a ``MismatchError``. Packing costs two passes over the tensors, a call with many small ones
saves their latencies.
"""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import NamedTuple

import torch
from torch import Tensor

from pycomm._core import DType, Group
from pycomm.arguments import refuse
from pycomm.collectives.autograd import blocking_only, followed, linear
from pycomm.memory import refuse_shared_memory, writable
from pycomm.work import CoreWork, Together, Work, outcome


class Pack(NamedTuple):
    """The tensors of one dtype and device in a list of ``of``."""

    of: int
    dtype: DType
    places: list[int]  # in the caller's list
    tensors: list[Tensor]

    @property
    def name(self) -> str:
        shapes = " ".join(str(tuple(t.shape)) for t in self.tensors)
        return f"{len(self.tensors)} of {self.of} tensors: {shapes}"

    def flat(self) -> Tensor:
        """All elements, row-major, end to end."""
        return torch.cat([t.reshape(-1) for t in self.tensors])

    def lengths(self) -> list[int]:
        return [t.numel() for t in self.tensors]

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Views of ``flat``, the inverse of ``flat()``."""
        parts = torch.split(flat, self.lengths())
        return [part.view(t.shape) for part, t in zip(parts, self.tensors, strict=True)]


# Starts one pack's operation on its packed input, into the packed output.
Start = Callable[[Pack, Tensor, Tensor], CoreWork | None]


def packs_of(
    call: str,
    tensors: Sequence[Tensor],
    group: Group,
    dtype_of: Callable[[str, Tensor], DType],
) -> list[Pack]:
    """One for each dtype and device, in the order of their first tensors."""
    if isinstance(tensors, Tensor):
        refuse(
            call, group, "tensors is a Tensor. Pass a list of tensors, or call the form for one."
        )
    if not isinstance(tensors, Sized) or not isinstance(tensors, Iterable):
        refuse(call, group, f"tensors is a {type(tensors).__name__}. Pass a list of tensors.")
    packs: dict[tuple[DType, torch.device], Pack] = {}
    for index, t in enumerate(tensors):
        dtype = dtype_of(f"tensors[{index}]", t)
        pack = packs.setdefault((dtype, t.device), Pack(len(tensors), dtype, [], []))
        pack.places.append(index)
        pack.tensors.append(t)
    return list(packs.values())


def check_blocking(call: str, tensors: Sequence[Tensor], group: Group, async_op: bool) -> None:
    if any(map(followed, tensors)):
        blocking_only(call, group, async_op)


def check_writable(call: str, tensors: Sequence[Tensor], group: Group) -> None:
    for index, t in enumerate(tensors):
        writable(call, f"tensors[{index}]", t, group)
    refuse_shared_memory(call, tensors, group)


def new_tensors(
    packs: list[Pack],
    packed: Callable[[Pack], Tensor],
    output_for: Callable[[Tensor], Tensor],
    start: Start,
    transpose: Callable[[Tensor], Tensor],
    cut: Callable[[Pack, Tensor], list[Tensor]],
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> list[Tensor] | Work[list[Tensor]]:
    """Run ``start`` on every pack; the results in the order of the caller's list."""
    works: list[CoreWork | None] = [] if packs else _barrier(group, timeout_s, async_op)
    sources: list[Tensor] = []
    outputs: list[Tensor] = []
    for pack in packs:

        def function(source: Tensor, pack: Pack = pack) -> Tensor:
            output = output_for(source)
            works.append(start(pack, source, output))
            return output

        source = packed(pack)
        sources.append(source)
        outputs.append(
            linear(source, function, transpose) if followed(source) else function(source)
        )

    def finish() -> list[Tensor]:
        results: dict[int, Tensor] = {}
        for pack, output in zip(packs, outputs, strict=True):
            results.update(zip(pack.places, cut(pack, output), strict=True))
        return [results[place] for place in range(len(results))]

    return outcome(_together(works, async_op), (sources, outputs), finish)


def in_place(
    packs: list[Pack],
    flats: list[Tensor],
    start: Start,
    group: Group,
    timeout_s: float,
    async_op: bool,
) -> Work[None] | None:
    """Run ``start`` on every pack in its ``flats``, and copy those back into the tensors."""
    works = [start(pack, flat, flat) for pack, flat in zip(packs, flats, strict=True)]
    works = works or _barrier(group, timeout_s, async_op)

    def finish() -> None:
        with torch.no_grad():
            for pack, flat in zip(packs, flats, strict=True):
                torch._foreach_copy_(pack.tensors, pack.cut(flat))

    return outcome(_together(works, async_op), flats, finish)


def _barrier(group: Group, timeout_s: float, async_op: bool) -> list[CoreWork | None]:
    """In place of packs: ranks whose lists are not empty learn that this one's is."""
    return [group.barrier(timeout_s=timeout_s, async_op=async_op)]


def _together(works: list[CoreWork | None], async_op: bool) -> CoreWork | None:
    return Together([work for work in works if work is not None]) if async_op else None
