"""Ranks that make each collective of torch.distributed twice, on pycomm and on gloo, and compare.

``python torch_collectives_program.py folder`` runs every case on 2 and on 4 ranks, see
``forked_ranks``. What gloo takes, pycomm takes, with the same bits; the numbers are small integers,
whose sums are exact in every dtype.
"""

# ruff: noqa: B023  # the lambdas in loops are called in the loop
from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import gloo_versions
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from forked_ranks import Rank, Scenario, run_all
from torch import Tensor
from torch.distributed import distributed_c10d

from pycomm.torch_backend.work import Work, Works

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.int16,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
BY_GLOO = (*DTYPES[:8],)  # what it moves; complex ones as pairs, in some calls
OPS = {
    "sum": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}
WAYS = ("blocking", "wait", "future")


@dataclass(frozen=True)
class Groups:
    """The same ranks twice."""

    ours: Any
    gloo: Any
    rank: int
    size: int


Case = Callable[[Groups], None]
CASES: dict[str, Case] = {}


def case(body: Case) -> Case:
    CASES[body.__name__] = body
    return body


def values(rank: int, shape: Sequence[int] = (3, 5), dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, others on each rank."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randint(0, 4, tuple(shape), generator=generator)
    if dtype.is_complex:
        return torch.complex(
            drawn.double(), drawn.flip(-1).double() if shape else drawn.double()
        ).to(dtype)
    return drawn.to(dtype)


def finish(way: str, start: Callable[..., Any]) -> Any:
    """Make a call to its end: blocking, or by one of the two ways to wait."""
    if way == "blocking":
        assert start(async_op=False) is None
        return None
    work = start(async_op=True)
    if way == "wait":
        work.wait()
        if isinstance(work, Work):
            assert work.is_completed() and work.is_success() and work.exception() is None
        return None
    if isinstance(work, torch._C.Future):  # what some functions return
        return work.wait()
    try:
        future = work.get_future()
    except RuntimeError:
        if isinstance(work, Work):
            raise
        return work.wait()  # gloo has not always one
    return future.wait()


def same(ours: Any, gloo: Any) -> None:
    """The same tensors, bit for bit."""
    if isinstance(ours, Tensor):
        assert ours.dtype == gloo.dtype and ours.shape == gloo.shape, (ours, gloo)
        if ours.is_sparse:
            ours, gloo = ours.to_dense(), gloo.to_dense()
        assert torch.equal(ours, gloo), f"pycomm:\n{ours}\ngloo:\n{gloo}"
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(gloo)
        for one, other in zip(ours, gloo, strict=True):
            same(one, other)
    else:
        assert ours == gloo, (ours, gloo)


def compare(groups: Groups, call: Callable[[Any], Any]) -> None:
    """``call(group)`` gives the same on both."""
    same(call(groups.ours), call(groups.gloo))


def both_refuse(groups: Groups, call: Callable[[Any], Any], *, says: str = "") -> None:
    """``call(group)`` raises on both, and ours says what is wrong."""
    if gloo_versions.REFUSES_BAD_INPUT:
        refuses(groups.gloo, call)
    text = refuses(groups.ours, call)
    assert says in text, text


def refuses(group: Any, call: Callable[[Any], Any]) -> str:
    try:
        call(group)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    raise AssertionError(f"{group.name()} took it")


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in tensors that lie in memory in other ways."""
    yield "contiguous", t.clone()
    if t.dim() == 2:
        yield "transposed", t.t().contiguous().t()
        wide = torch.zeros(t.shape[0], 2 * t.shape[1], dtype=t.dtype)
        yield "with gaps", wide[:, ::2].copy_(t)
        yield "offset", torch.cat([torch.zeros_like(t), t])[t.shape[0] :]
    if t.is_floating_point():
        yield "leaf that requires grad", t.clone().requires_grad_()


def with_layouts(groups: Groups, call: Callable[[Any, Tensor], Any], t: Tensor) -> None:
    """Gloo gets it contiguous, and pycomm in every layout."""
    expected = call(groups.gloo, t.clone())
    for layout, laid_out in layouts(t):
        try:
            same(call(groups.ours, laid_out), expected)
        except Exception as error:
            raise AssertionError(f"{layout}: {error}") from error


# --- reductions ----------------------------------------------------------------------------------


def reduced(group: Any, t: Tensor, op: Any, way: str) -> Tensor:
    finish(way, functools.partial(dist.all_reduce, t, op, group))
    return t


@case
def all_reduce_of_every_dtype_and_op(groups: Groups) -> None:
    for dtype in DTYPES:
        t = values(groups.rank, dtype=dtype)
        for name, op in OPS.items():
            try:
                expected = reduced(groups.gloo, t.clone(), op, "blocking")
            except (RuntimeError, ValueError):
                continue  # what pycomm then does is in `refused_reductions`
            same(reduced(groups.ours, t.clone(), op, "blocking"), expected)
            del name


@case
def all_reduce_in_every_way(groups: Groups) -> None:
    for way in WAYS:
        for shape in ((3, 5), (), (0,), (2, 0, 3), (1,), (1000,), (70_001,)):
            t = values(groups.rank, shape)
            compare(groups, lambda group: reduced(group, t.clone(), dist.ReduceOp.SUM, way))
        with_layouts(
            groups,
            lambda group, t: reduced(group, t, dist.ReduceOp.SUM, way),
            values(groups.rank),
        )


@case
def all_reduce_of_a_view_that_negates(groups: Groups) -> None:
    negative = (values(groups.rank, dtype=torch.complex64) * (1 + 2j)).conj().imag
    assert negative.is_neg()
    expected = reduced(groups.gloo, negative.clone(), dist.ReduceOp.SUM, "blocking")
    same(reduced(groups.ours, negative, dist.ReduceOp.SUM, "blocking"), expected)


@case
def refused_reductions(groups: Groups) -> None:
    for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        both_refuse(
            groups,
            lambda group: dist.all_reduce(torch.ones(3), op, group),
            says="float32",
        )
    for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        t = torch.ones(3, dtype=torch.complex64)
        if op == dist.ReduceOp.PRODUCT:
            continue  # a pycomm that multiplies complex numbers is right
        both_refuse(groups, lambda group: dist.all_reduce(t, op, group), says="all_reduce")
    both_refuse(groups, lambda group: dist.all_reduce([torch.ones(3)], group=group))
    both_refuse(groups, lambda group: dist.all_reduce(torch.ones(3).to_mkldnn(), group=group))
    # Nothing was sent, and the groups go on.
    compare(groups, lambda group: reduced(group, torch.ones(3), dist.ReduceOp.SUM, "blocking"))


@case
def averages_and_scaled_sums(groups: Groups) -> None:
    """Gloo has neither."""
    t = torch.full((3,), float(groups.rank))
    dist.all_reduce(t, dist.ReduceOp.AVG, groups.ours)
    same(t, torch.full((3,), (groups.size - 1) / 2))
    t = torch.full((3,), 4.0)
    dist.all_reduce(t, dist._make_nccl_premul_sum(0.5), groups.ours)
    same(t, torch.full((3,), 2.0 * groups.size))


@case
def all_reduce_coalesced(groups: Groups) -> None:
    def call(group: Any, way: str) -> list[Tensor]:
        tensors = [values(groups.rank), values(groups.rank + 9, (7,)), torch.ones(0)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finish(way, functools.partial(dist.all_reduce_coalesced, tensors, group=group))
        return tensors

    for way in WAYS:
        compare(groups, lambda group: call(group, way))


@case
def sparse_all_reduce(groups: Groups) -> None:
    def sparse(entries: int) -> Tensor:
        indices = torch.tensor([[(groups.rank + i) % 6, i % 4] for i in range(entries)]).reshape(
            -1, 2
        )
        return torch.sparse_coo_tensor(indices.t(), values(groups.rank, (entries, 3)), (6, 4, 3))

    for way in WAYS:
        for entries in (4, groups.rank, 0, 9):  # nine of which some lie at one place
            compare(
                groups,
                lambda group: reduced(group, sparse(entries), dist.ReduceOp.SUM, way),
            )
    both_refuse(groups, lambda group: dist.all_reduce(sparse(2), dist.ReduceOp.MAX, group))


@case
def reduce(groups: Groups) -> None:
    def call(group: Any, t: Tensor, root: int, op: Any, way: str) -> Tensor:
        finish(way, functools.partial(dist.reduce, t, root, op, group))
        # Gloo leaves partial sums in the tensors of the others.
        return t if groups.rank == root else torch.zeros(0)

    for root in range(groups.size):
        for way in WAYS:
            with_layouts(
                groups,
                lambda group, t: call(group, t, root, dist.ReduceOp.SUM, way),
                values(groups.rank),
            )
    for dtype in (torch.int64, torch.uint8, torch.float16):
        for op in (dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
            t = values(groups.rank, dtype=dtype)
            compare(groups, lambda group: call(group, t.clone(), 1, op, "blocking"))
    both_refuse(groups, lambda group: dist.reduce(torch.ones(3), groups.size, group=group))


@case
def reduce_scatter(groups: Groups) -> None:
    def call(group: Any, shapes: Sequence[Sequence[int]], op: Any, way: str) -> Tensor:
        inputs = [values(groups.rank + 10 * r, shape) for r, shape in enumerate(shapes)]
        output = torch.zeros(tuple(shapes[groups.rank]))
        finish(way, functools.partial(dist.reduce_scatter, output, inputs, op, group))
        return output

    even = [(2, 3)] * groups.size
    for way in WAYS:
        compare(groups, lambda group: call(group, even, dist.ReduceOp.SUM, way))
        compare(groups, lambda group: call(group, even, dist.ReduceOp.MAX, way))
        empty = [(0,)] * groups.size
        compare(groups, lambda group: call(group, empty, dist.ReduceOp.SUM, way))
        # Blocks of different sizes, which gloo does not always take.
        uneven = [(r + 1, 3) for r in range(groups.size)]
        got = call(groups.ours, uneven, dist.ReduceOp.SUM, way)
        same(
            got,
            sum(values(r + 10 * groups.rank, uneven[groups.rank]) for r in range(groups.size)),
        )


@case
def reduce_scatter_tensor(groups: Groups) -> None:
    def call(group: Any, t: Tensor, way: str) -> Tensor:
        output = torch.zeros(2, 3, dtype=t.dtype)
        finish(way, functools.partial(dist.reduce_scatter_tensor, output, t, group=group))
        return output

    for way in WAYS:
        for dtype in (torch.float32, torch.int64, torch.bfloat16):
            t = values(groups.rank, (2 * groups.size, 3), dtype)
            with_layouts(groups, lambda group, t: call(group, t, way), t)
    both_refuse(
        groups, lambda group: dist.reduce_scatter_tensor(torch.ones(2), torch.ones(3), group=group)
    )
    both_refuse(
        groups,
        lambda group: dist.reduce_scatter_tensor(
            torch.ones(2), torch.ones(2 * groups.size, dtype=torch.int32), group=group
        ),
    )


# --- moves ---------------------------------------------------------------------------------------


@case
def broadcast(groups: Groups) -> None:
    def call(group: Any, t: Tensor, root: int, way: str) -> Tensor:
        finish(way, functools.partial(dist.broadcast, t, root, group))
        return t

    for root in range(groups.size):
        for way in WAYS:
            with_layouts(groups, lambda group, t: call(group, t, root, way), values(groups.rank))
            for shape in ((), (0,), (33_333,)):
                t = values(groups.rank, shape)
                compare(groups, lambda group: call(group, t.clone(), root, way))
    for dtype in DTYPES:
        t = values(groups.rank, dtype=dtype)
        if dtype in BY_GLOO:
            compare(groups, lambda group: call(group, t.clone(), 0, "blocking"))
        same(call(groups.ours, t, 0, "blocking"), values(0, dtype=dtype))
    same(
        _by_group_root(groups.ours, groups.size - 1, values(groups.rank)),
        _by_group_root(groups.gloo, groups.size - 1, values(groups.rank)),
    )
    both_refuse(groups, lambda group: dist.broadcast(torch.ones(3), groups.size, group))


def _by_group_root(group: Any, root: int, t: Tensor) -> Tensor:
    dist.broadcast(t, group=group, group_src=root)
    return t


@case
def all_gather(groups: Groups) -> None:
    def call(group: Any, t: Tensor, shapes: Sequence[Sequence[int]], way: str) -> list[Tensor]:
        outputs = [torch.zeros(tuple(shape), dtype=t.dtype) for shape in shapes]
        finish(way, functools.partial(dist.all_gather, outputs, t, group))
        return outputs

    for way in WAYS:
        with_layouts(
            groups,
            lambda group, t: call(group, t, [(3, 5)] * groups.size, way),
            values(groups.rank),
        )
        for shape in ((), (0,), (12_345,)):
            t = values(groups.rank, shape)
            compare(groups, lambda group: call(group, t, [shape] * groups.size, way))
        uneven = [(r + 1, 2) for r in range(groups.size)]
        got = call(groups.ours, values(groups.rank, uneven[groups.rank]), uneven, way)
        same(got, [values(r, shape) for r, shape in enumerate(uneven)])
    for dtype in DTYPES:
        t = values(groups.rank, dtype=dtype)
        shapes = [t.shape] * groups.size
        if dtype in BY_GLOO:
            compare(groups, lambda group: call(group, t, shapes, "blocking"))
        got = call(groups.ours, t, shapes, "blocking")
        same(got, [values(r, dtype=dtype) for r in range(groups.size)])
    # Outputs that cannot be written in one piece.
    rows = torch.zeros(groups.size, 15, 2)
    dist.all_gather([row[:, 0] for row in rows], values(groups.rank, (15,)), groups.ours)
    same(rows[:, :, 0], torch.stack([values(r, (15,)) for r in range(groups.size)]))
    same(rows[:, :, 1], torch.zeros(groups.size, 15))
    both_refuse(groups, lambda group: dist.all_gather([torch.ones(3)], torch.ones(3), group))
    both_refuse(
        groups,
        lambda group: dist.all_gather(
            [torch.ones(3, dtype=torch.int32)] * groups.size, torch.ones(3), group
        ),
    )


@case
def all_gather_into_tensor(groups: Groups) -> None:
    def call(group: Any, t: Tensor, way: str, *, stack: bool = False) -> Tensor:
        shape = (groups.size, *t.shape) if stack else (groups.size * t.shape[0], *t.shape[1:])
        output = torch.zeros(shape, dtype=t.dtype)
        finish(way, functools.partial(dist.all_gather_into_tensor, output, t, group))
        return output

    for way in WAYS:
        with_layouts(groups, lambda group, t: call(group, t, way), values(groups.rank))
        same(  # gloo does not stack
            call(groups.ours, values(groups.rank), way, stack=True),
            torch.stack([values(r) for r in range(groups.size)]),
        )
    for dtype in DTYPES:
        t = values(groups.rank, dtype=dtype)
        if dtype in BY_GLOO:
            compare(groups, lambda group: call(group, t, "blocking"))
        same(
            call(groups.ours, t, "blocking"),
            torch.cat([values(r, dtype=dtype) for r in range(groups.size)]),
        )
    # In place, as FSDP does it, and into a tensor with gaps.
    whole = torch.zeros(groups.size * 4)
    part = whole[4 * groups.rank : 4 * groups.rank + 4].copy_(values(groups.rank, (4,)))
    dist.all_gather_into_tensor(whole, part, groups.ours)
    same(whole, torch.cat([values(r, (4,)) for r in range(groups.size)]))
    gaps = torch.zeros(groups.size * 4, 2)
    dist.all_gather_into_tensor(gaps[:, 0], values(groups.rank, (4,)), groups.ours)
    same(gaps[:, 0], whole)
    both_refuse(
        groups, lambda group: dist.all_gather_into_tensor(torch.ones(3), torch.ones(2), group)
    )


@case
def all_gather_coalesced(groups: Groups) -> None:
    def call(group: Any, way: str) -> Any:
        inputs = [values(groups.rank), values(groups.rank, (4,)), torch.ones(0)]
        outputs = [[torch.zeros_like(t) for t in inputs] for _ in range(groups.size)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finish(way, functools.partial(dist.all_gather_coalesced, outputs, inputs, group))
        return outputs

    for way in WAYS:
        compare(groups, lambda group: call(group, way))


@case
def gather(groups: Groups) -> None:
    def call(group: Any, t: Tensor, root: int, way: str) -> Any:
        outputs = [torch.zeros(t.shape, dtype=t.dtype) for _ in range(groups.size)]
        mine = outputs if groups.rank == root else None
        finish(way, functools.partial(dist.gather, t, mine, root, group))
        return outputs

    for way in WAYS:
        for root in (0, groups.size - 1):
            with_layouts(groups, lambda group, t: call(group, t, root, way), values(groups.rank))
            compare(groups, lambda group: call(group, torch.ones(0), root, way))
    both_refuse(
        groups,
        lambda group: dist.gather(
            torch.ones(3), None if groups.rank == 0 else [torch.ones(3)] * groups.size, 0, group
        ),
    )


@case
def scatter(groups: Groups) -> None:
    def call(group: Any, root: int, way: str, dtype: torch.dtype) -> Tensor:
        output = torch.zeros(3, 5, dtype=dtype)
        inputs = [values(10 + r, dtype=dtype) for r in range(groups.size)]
        mine = inputs if groups.rank == root else None
        finish(way, functools.partial(dist.scatter, output, mine, root, group))
        return output

    for way in WAYS:
        for root in (0, groups.size - 1):
            for dtype in (torch.float32, torch.int64, torch.complex64):
                compare(groups, lambda group: call(group, root, way, dtype))
    gaps = torch.zeros(3, 5, 2)
    inputs = [values(10 + r) for r in range(groups.size)] if groups.rank == 0 else None
    dist.scatter(gaps[:, :, 0], inputs, 0, groups.ours)
    same(gaps[:, :, 0], values(10 + groups.rank))


@case
def all_to_all_single(groups: Groups) -> None:
    p = groups.size

    def call(
        group: Any, splits: Callable[[int, int], int] | None, way: str, dtype: torch.dtype
    ) -> Tensor:
        if splits is None:
            t, output, sizes = (
                values(groups.rank, (2 * p, 3), dtype),
                torch.zeros(2 * p, 3, dtype=dtype),
                (),
            )
        else:
            sent = [splits(groups.rank, r) for r in range(p)]
            got = [splits(r, groups.rank) for r in range(p)]
            t, output, sizes = (
                values(groups.rank, (sum(sent), 3), dtype),
                torch.zeros(sum(got), 3, dtype=dtype),
                (got, sent),
            )
        finish(way, functools.partial(dist.all_to_all_single, output, t, *sizes, group=group))
        return output

    for way in WAYS:
        for splits in (None, lambda a, b: a + b, lambda a, b: 3 * (a == b), lambda a, b: 0):
            for dtype in (torch.float32, torch.uint8, torch.complex64):
                compare(groups, lambda group: call(group, splits, way, dtype))
    # A rank whose blocks happen to be equal may leave the splits out.
    for way in WAYS:
        sizes = ([2] * p, [2] * p) if groups.rank == 0 else ()
        t, output = values(groups.rank, (2 * p, 3)), torch.zeros(2 * p, 3)
        finish(way, functools.partial(dist.all_to_all_single, output, t, *sizes, group=groups.ours))
        same(output, call(groups.gloo, None, way, torch.float32))
    refuses(  # and gloo sends a part of it
        groups.ours,
        lambda group: dist.all_to_all_single(torch.ones(p + 1), torch.ones(p + 1), group=group),
    )
    both_refuse(
        groups,
        lambda group: dist.all_to_all_single(
            torch.ones(p), torch.ones(p), [1] * p, [2] * p, group=group
        ),
    )


@case
def all_to_all(groups: Groups) -> None:
    """Gloo has none: checked against what was sent."""
    p = groups.size
    for way in WAYS:
        inputs = [values(100 * groups.rank + r, (groups.rank + 1, r + 1)) for r in range(p)]
        outputs = [torch.zeros(r + 1, groups.rank + 1) for r in range(p)]
        finish(way, functools.partial(dist.all_to_all, outputs, inputs, groups.ours))
        same(outputs, [values(100 * r + groups.rank, (r + 1, groups.rank + 1)) for r in range(p)])


@case
def barriers(groups: Groups) -> None:
    for group in (groups.ours, groups.gloo):
        dist.barrier(group)
        dist.barrier(group, async_op=True).wait()
        assert dist.barrier(group=group, async_op=False, device_ids=None) is None
        work = dist.barrier(group=group, async_op=True)
        work.get_future().wait()
    # Nobody leaves before the last has come.
    came = time.monotonic()
    if groups.rank == 0:
        time.sleep(0.3)
    dist.barrier(groups.ours)
    assert groups.rank == 0 or time.monotonic() - came > 0.1


@case
def monitored_barriers(groups: Groups) -> None:
    for group in (groups.ours, groups.gloo):
        dist.monitored_barrier(group)
        distributed_c10d.monitored_barrier(group=group, timeout=timedelta(seconds=30))
        dist.monitored_barrier(group, timedelta(seconds=30), wait_all_ranks=True)
    both_refuse(groups, lambda group: dist.monitored_barrier(group, timeout="soon"))
    late = groups.size - 1
    for wait_all_ranks in (False, True):
        # Who does not come in time is named, on every rank, and the group goes on.
        if groups.rank == late:
            time.sleep(1)
        text = refuses(
            groups.ours,
            lambda group: dist.monitored_barrier(
                group, timedelta(seconds=0.3), wait_all_ranks=wait_all_ranks
            ),
        )
        assert f"on rank {groups.rank}" in text and f"Rank {late} failed to pass" in text, text
        dist.barrier(groups.ours)


# --- messages ------------------------------------------------------------------------------------


@case
def messages(groups: Groups) -> None:
    right, left = (groups.rank + 1) % groups.size, (groups.rank - 1) % groups.size

    def call(group: Any, t: Tensor, tag: int) -> Tensor:
        output = torch.zeros(t.shape, dtype=t.dtype)
        work = dist.isend(t, right, group, tag)
        dist.recv(output, left, group, tag)
        work.wait()
        return output

    for shape in ((), (0,), (3, 5), (100_000,)):
        t = values(groups.rank, shape)
        compare(groups, lambda group: call(group, t, 3))
    for dtype in DTYPES:
        t = values(groups.rank, dtype=dtype)
        compare(groups, lambda group: call(group, t, 0))
    with_layouts(groups, lambda group, t: call(group, t, 0), values(groups.rank))
    gaps = torch.zeros(3, 5, 2)
    works = [
        dist.irecv(gaps[:, :, 0], left, groups.ours),
        dist.isend(values(groups.rank), right, groups.ours),
    ]
    for work in works:
        work.wait()
    same(gaps[:, :, 0], values(left))
    both_refuse(groups, lambda group: dist.send(torch.ones(3), groups.rank, group))
    both_refuse(groups, lambda group: dist.send([torch.ones(3)], right, group))


@case
def messages_do_not_wait_for_their_turn(groups: Groups) -> None:
    """Sends of all sizes return at once; tags choose among what has come."""
    group = groups.ours
    right, left = (groups.rank + 1) % groups.size, (groups.rank - 1) % groups.size
    sizes = (1, 1000, 3_000_000)
    sent = [
        dist.isend(torch.full((n,), float(tag)), right, group, tag) for tag, n in enumerate(sizes)
    ]
    reducing = dist.all_reduce(torch.ones(3), group=group, async_op=True)
    for tag, n in reversed(list(enumerate(sizes))):
        output = torch.zeros(n)
        assert dist.recv(output, left, group, tag) == dist.get_process_group_ranks(group)[left]
        same(output, torch.full((n,), float(tag)))
    for work in sent:
        assert work.wait()
    reducing.wait()


@case
def messages_of_any_rank(groups: Groups) -> None:
    def call(group: Any, asynchronous: bool) -> list[int]:
        if groups.rank != 0:
            dist.send(torch.full((4,), float(groups.rank)), 0, group)
            return []
        sources = []
        for _ in range(groups.size - 1):
            t = torch.zeros(4)
            if asynchronous:
                work = dist.irecv(t, group=group)
                work.wait()
                source = work._source_rank()
            else:
                source = dist.recv(t, group=group)
            same(t, torch.full((4,), float(source)))
            sources.append(source)
        return sorted(sources)

    for asynchronous in (False, True):
        compare(groups, lambda group: call(group, asynchronous))
        dist.barrier(groups.ours)


@case
def batches_of_messages(groups: Groups) -> None:
    def call(group: Any) -> list[Tensor]:
        outputs = [torch.zeros(5) for _ in range(groups.size)]
        works = []
        for r in range(groups.size):
            if r != groups.rank:
                works += dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, values(groups.rank, (5,)), r, group),
                        dist.P2POp(dist.irecv, outputs[r], r, group),
                    ]
                )
        for work in works:
            work.wait()
        return outputs

    compare(groups, call)


# --- objects -------------------------------------------------------------------------------------


@case
def objects(groups: Groups) -> None:
    mine = {"rank": groups.rank, "text": "x" * (1000 * groups.rank), "t": [1.5, None]}

    def gathered(group: Any) -> list[Any]:
        outputs: list[Any] = [None] * groups.size
        dist.all_gather_object(outputs, mine, group)
        return outputs

    def at_root(group: Any) -> Any:
        outputs: Any = [None] * groups.size if groups.rank == 1 else None
        dist.gather_object(mine, outputs, 1, group)
        return outputs

    def broadcast(group: Any) -> list[Any]:
        things = [mine, groups.rank, None] if groups.rank == 1 else [None, None, None]
        dist.broadcast_object_list(things, 1, group, device=torch.device("cpu"))
        return things

    def scattered(group: Any) -> list[Any]:
        output: list[Any] = [None]
        inputs = [{"for": r} for r in range(groups.size)] if groups.rank == 0 else None
        dist.scatter_object_list(output, inputs, 0, group)
        return output

    def sent(group: Any) -> list[Any]:
        things = [mine, "second"] if groups.rank == 0 else [None, None]
        if groups.rank == 0:
            dist.send_object_list(things, 1, group)
        elif groups.rank == 1:
            dist.recv_object_list(things, 0, group)
        return things

    for call in (gathered, at_root, broadcast, scattered, sent):
        compare(groups, call)


# --- groups --------------------------------------------------------------------------------------


@case
def subgroups(groups: Groups) -> None:
    """Overlapping ones, in an order of their own, and ranks that are not in them."""
    p = groups.size
    members = [[0], list(range(p)), [p - 1, 0], list(range(1, p))]
    ours = [dist.new_group(ranks, backend="pycomm") for ranks in members]
    gloo = [dist.new_group(ranks, backend="gloo") for ranks in members]
    for ranks, one, other in zip(members, ours, gloo, strict=True):
        if groups.rank not in ranks:
            assert one == dist.GroupMember.NON_GROUP_MEMBER
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert dist.all_reduce(torch.ones(3), group=one) is None
                dist.monitored_barrier(one)
            continue
        assert dist.get_backend(one) == "pycomm"
        assert dist.get_rank(one) == dist.get_rank(other)
        assert dist.get_process_group_ranks(one) == dist.get_process_group_ranks(other)
        pair = Groups(one, other, groups.rank, len(ranks))
        compare(pair, lambda group: reduced(group, values(groups.rank), dist.ReduceOp.SUM, "wait"))
        root = ranks[-1]
        compare(pair, lambda group: _broadcast(group, values(groups.rank), root))
    for one in (*ours, *gloo):
        if one != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(one)


def _broadcast(group: Any, t: Tensor, root: int) -> Tensor:
    dist.broadcast(t, root, group)
    return t


@case
def groups_made_by_their_members_alone(groups: Groups) -> None:
    half = groups.size // 2
    ranks = list(range(half)) if groups.rank < half else list(range(half, groups.size))
    group = dist.new_group(ranks, backend="pycomm", use_local_synchronization=True)
    t = torch.ones(3)
    dist.all_reduce(t, group=group)
    same(t, torch.full((3,), float(len(ranks))))
    dist.destroy_process_group(group)


@case
def groups_by_enumeration(groups: Groups) -> None:
    mine, every = dist.new_subgroups(group_size=groups.size // 2, backend="pycomm")
    assert len(every) == 2
    t = torch.ones(3)
    dist.all_reduce(t, group=mine)
    same(t, torch.full((3,), groups.size / 2))
    mine, _ = dist.new_subgroups_by_enumeration([[r] for r in range(groups.size)], backend="pycomm")
    dist.all_reduce(t, group=mine)
    same(t, torch.full((3,), groups.size / 2))


@case
def many_groups_in_a_row(groups: Groups) -> None:
    for _ in range(20):
        group = dist.new_group(backend="pycomm")
        reduced(group, torch.ones(3), dist.ReduceOp.SUM, "blocking")
        dist.destroy_process_group(group)


# --- coalesced and functional calls --------------------------------------------------------------


@case
def coalescing_manager(groups: Groups) -> None:
    manager = distributed_c10d._coalescing_manager

    def reductions(group: Any, device: Any, asynchronous: bool) -> list[Tensor]:
        tensors = [values(groups.rank, (n,)) for n in (3, 7, 1)]
        with manager(group, device, asynchronous) as pending:
            for t in tensors:
                dist.all_reduce(t, group=group)
        if asynchronous:
            pending.wait()
        return tensors

    def gathers(group: Any, asynchronous: bool) -> list[Tensor]:
        outputs = [torch.zeros(groups.size * n) for n in (3, 7)]
        with manager(group, torch.device("cpu"), asynchronous) as pending:
            for output in outputs:
                n = output.numel() // groups.size
                dist.all_gather_into_tensor(output, values(groups.rank, (n,)), group)
        if asynchronous:
            pending.wait()
        return outputs

    def scatters(group: Any, asynchronous: bool) -> list[Tensor]:
        outputs = [torch.zeros(n) for n in (3, 7)]
        with manager(group, torch.device("cpu"), asynchronous) as pending:
            for output in outputs:
                source = values(groups.rank, (groups.size * output.numel(),))
                dist.reduce_scatter_tensor(output, source, group=group)
        if asynchronous:
            pending.wait()
        return outputs

    p = groups.size
    for asynchronous in (False, True):
        for device in (None, torch.device("cpu")):
            same(
                reductions(groups.ours, device, asynchronous),
                [sum(values(r, (n,)) for r in range(p)) for n in (3, 7, 1)],
            )
        same(
            gathers(groups.ours, asynchronous),
            [torch.cat([values(r, (n,)) for r in range(p)]) for n in (3, 7)],
        )
        same(
            scatters(groups.ours, asynchronous),
            [sum(values(r, (p * n,)).view(p, n)[groups.rank] for r in range(p)) for n in (3, 7)],
        )


@case
def coalesced_operations_share_the_timeout_of_a_wait(groups: Groups) -> None:
    left: list[timedelta] = []

    class Slow:
        def wait(self, timeout: timedelta) -> None:
            left.append(timeout)
            time.sleep(0.1)

    Works([Slow()] * 3).wait(timedelta(seconds=10))
    assert timedelta(seconds=9.9) >= left[1] >= left[2] + timedelta(seconds=0.1)


@case
def functional_collectives(groups: Groups) -> None:
    t = values(groups.rank, (2 * groups.size, 3))
    splits = [2] * groups.size
    calls: list[Callable[[Any], Any]] = [
        lambda group: functional.all_reduce(t, "sum", group),
        lambda group: functional.broadcast(t, 1, group),
        lambda group: functional.all_gather_tensor(t, 0, group),
        lambda group: functional.all_gather_tensor(t, 1, group),
        lambda group: functional.reduce_scatter_tensor(t, "sum", 0, group),
        lambda group: functional.all_reduce_coalesced([t, t + 1], "sum", group),
        lambda group: functional.all_gather_into_tensor_coalesced([t, t + 1], group),
        lambda group: functional.reduce_scatter_tensor_coalesced([t, t + 1], "sum", [0, 0], group),
        lambda group: functional.all_to_all_single(t, splits, splits, group),
        lambda group: functional.all_to_all_single(t, None, None, group),
    ]
    for call in calls:
        compare(groups, lambda group: _waited(call(group)))
    grad = t.clone().requires_grad_()
    compare(groups, lambda group: _grad_of(functional.all_gather_tensor_autograd, grad, group))
    # AVG, which gloo has not.
    got = functional.all_reduce(torch.full((3,), float(groups.rank)), "avg", groups.ours)
    same(_waited(got), torch.full((3,), (groups.size - 1) / 2))


def _waited(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return [_waited(item) for item in result]
    return functional.wait_tensor(result)


def _grad_of(call: Callable[..., Any], t: Tensor, group: Any) -> Tensor:
    (grad,) = torch.autograd.grad(_waited(call(t, 0, group)).square().sum(), t)
    return grad


@case
def functional_operators(groups: Groups) -> None:
    ops = torch.ops._c10d_functional
    t = values(groups.rank, (4, 3))

    def out(group: Any) -> Tensor:
        output = torch.zeros(4 * groups.size, 3)
        ops.all_gather_into_tensor_out(t, groups.size, group.group_name, out=output)
        return ops.wait_tensor(output)

    def in_place(group: Any) -> Tensor:
        mine = t.clone()
        return ops.wait_tensor(ops.all_reduce_(mine, "sum", group.group_name))

    def broadcast_in_place(group: Any) -> Tensor:
        mine = t.clone()
        return ops.wait_tensor(ops.broadcast_(mine, 1, group.group_name))

    def gathered(group: Any) -> Tensor:
        return ops.wait_tensor(ops.all_gather_into_tensor(t, groups.size, group.group_name))

    for call in (out, in_place, broadcast_in_place, gathered):
        compare(groups, call)


@case
def autograd_collectives(groups: Groups) -> None:
    """``torch.distributed.nn.functional``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.distributed.nn.functional as nn

    t = values(groups.rank).requires_grad_()
    calls: list[Callable[[Any], Tensor]] = [
        lambda group: nn.all_reduce(t * 1, group=group),
        lambda group: torch.cat(nn.all_gather(t * 1, group)),
        lambda group: nn.broadcast(t * 1, 0, group),
    ]
    for call in calls:

        def both(group: Any) -> list[Tensor]:
            result = call(group)
            return [result.detach(), *torch.autograd.grad(result.square().sum(), t)]

        compare(groups, both)


# --- what is asked of a group --------------------------------------------------------------------


@case
def names_and_numbers(groups: Groups) -> None:
    group = groups.ours
    assert dist.get_backend(group) == "pycomm" == dist.get_backend()
    assert group.name() == "pycomm"
    assert dist.get_backend_config(group) == "cpu:pycomm,cuda:pycomm"
    assert (dist.get_rank(group), dist.get_world_size(group)) == (groups.rank, groups.size)
    assert dist.distributed_c10d._get_default_store() is not None
    assert group.group_name and repr(group)
    distributed_c10d._set_pg_timeout(timedelta(seconds=77), group)
    dist.barrier(group)


@case
def tensors_whose_elements_share_memory(groups: Groups) -> None:
    """They can be sent, and refused before anything is sent where they would be written."""
    p, spread = groups.size, torch.full((1,), float(groups.rank)).expand(3)
    mine = torch.full((3,), float(groups.rank))
    for way in WAYS:
        for root in range(p):
            t = spread if groups.rank == root else mine.clone()
            finish(way, functools.partial(dist.broadcast, t, root, groups.ours))
            same(t.clone(), torch.full((3,), float(root)))
            t = mine.clone() if groups.rank == root else spread
            finish(way, functools.partial(dist.reduce, t, root, group=groups.ours))
            same(t.clone(), torch.full((3,), p * (p - 1) / 2) if groups.rank == root else mine)
        outputs = [torch.zeros(3) for _ in range(p)]
        finish(way, functools.partial(dist.all_gather, outputs, spread, groups.ours))
        same(outputs, [torch.full((3,), float(r)) for r in range(p)])
    writes: list[Callable[..., Any]] = [
        dist.all_reduce,
        lambda t, group: dist.all_gather([t] * p, mine, group),
        lambda t, group: dist.all_gather_into_tensor(t.view(1, 3).expand(p, 3), mine, group),
        lambda t, group: dist.reduce_scatter(t, [mine] * p, group=group),
        lambda t, group: dist.all_to_all([t] * p, [mine] * p, group),
        lambda t, group: dist.all_to_all_single(
            t.view(1, 3).expand(p, 3), torch.ones(p, 3), group=group
        ),
        lambda t, group: dist.recv(t, (groups.rank + 1) % p, group),
    ]
    for write in writes:
        text = refuses(groups.ours, lambda group: write(spread, group=group))
        assert "share memory" in text and f"on rank {groups.rank}" in text, text
    dist.barrier(groups.ours)


@case
def memory_is_free_when_an_operation_is_over(groups: Groups) -> None:
    """Waited for or dropped, and whatever is called next; what is copied at the end, too."""
    p = groups.size
    for waits in (True, False):
        outputs = [torch.zeros(1000) for _ in range(p)]
        freed = weakref.ref(outputs[0])
        work = dist.all_gather(outputs, torch.ones(1000), groups.ours, async_op=True)
        if waits:
            work.wait()
        del work, outputs
        eventually(lambda: freed() is None)


@case
def destroyed_groups_leave_nothing(groups: Groups) -> None:
    """Neither threads nor files, although the garbage collector does not run."""

    def resources() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    gc.collect()
    before = resources()
    gc.disable()
    try:
        for _ in range(5):
            group = dist.new_group(backend="pycomm")
            dist.all_reduce(torch.ones(3), group=group)
            dist.destroy_process_group(group)
            del group
        eventually(lambda: resources() <= before)
    finally:
        gc.enable()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@case
def own_timeouts_of_calls(groups: Groups) -> None:
    opts = dist.AllreduceOptions()
    opts.timeout = timedelta(seconds=20)
    t = torch.ones(3)
    work = groups.ours.allreduce([t], opts)
    if work is not None:
        work.wait()
    same(t, torch.full((3,), float(groups.size)))


# --- the program ---------------------------------------------------------------------------------


def run_cases(rank: Rank) -> None:
    dist.init_process_group(
        "pycomm",
        init_method=f"file://{rank.folder / 'store'}",
        rank=rank.rank,
        world_size=rank.size,
        timeout=timedelta(seconds=60),
    )
    gloo = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    for name, body in CASES.items():
        # A group of its own: a case that breaks it does not break the next.
        ours = dist.new_group(backend="pycomm", timeout=timedelta(seconds=60))
        began = time.monotonic()
        problem = ""
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                body(Groups(ours, gloo, rank.rank, rank.size))
        except Exception:
            problem = traceback.format_exc()
        rank.report(**{name: problem, f"seconds of {name}": time.monotonic() - began})
    dist.destroy_process_group()


if __name__ == "__main__":
    last = run_all(
        {f"{size} ranks": Scenario(run_cases, size, 150.0) for size in (2, 4)}, Path(sys.argv[1])
    )
    if last is not None:
        last()
