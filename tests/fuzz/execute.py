"""One rank's part of a program: makes the calls, and compares what comes of them."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

import pycomm
from fuzz.program import DropGroup, MakeGroup, Operation, Program, Threads
from fuzz.reference import Reduction, bits, joined, moved, moved_dtype, rows_of_list, splits
from pycomm import Group

Finish = Callable[[], None]
STEP = "step "  # begins what a failure says, before the step's number


class WrongResultError(Exception):
    """What a rank got is not what NumPy says."""


def execute(program: Program, world: Group) -> None:
    """
    Raises:
        WrongResultError, CommError: with the number of the step in front.
    """
    _Rank(program, world).run()


class _Rank:
    def __init__(self, program: Program, world: Group) -> None:
        self._program = program
        self._rank = world.rank
        self._groups: dict[int, Group] = {0: world}
        self._next_group = 1
        self._pending: dict[int, list[tuple[int, Finish]]] = {}  # by the step they are waited after
        self._draw = random.Random(repr((program.seed, self._rank)))

    def run(self) -> None:
        for number, step in enumerate(self._program.steps):
            with _Numbered(number):
                self._take(number, step)
            waiting = self._pending.pop(number, [])
            self._draw.shuffle(waiting)  # each rank waits in an order of its own
            for issued, finish in waiting:
                with _Numbered(issued):
                    finish()

    def _take(self, number: int, step: object) -> None:
        if self._draw.random() < 0.02:
            time.sleep(self._draw.random() * 2e-3)
        if isinstance(step, MakeGroup):
            self._make_group(step)
        elif isinstance(step, DropGroup):
            # What was issued on it goes on.
            self._groups.pop(step.group, None)
        elif isinstance(step, Threads):
            self._run_threads(step)
        elif isinstance(step, Operation) and step.group in self._groups:
            finish = issue(step, self._groups[step.group])
            if step.wait_after is None:
                finish()
            else:
                self._pending.setdefault(step.wait_after, []).append((number, finish))

    def _make_group(self, step: MakeGroup) -> None:
        parent = self._groups.get(step.parent)
        numbers = range(self._next_group, self._next_group + len(step.members))
        self._next_group += len(step.members)
        if parent is None:
            return
        mine = [i for i, members in enumerate(step.members) if parent.rank in members]
        if step.how == "duplicate":
            made: Group | None = parent.duplicate()
        elif step.how == "new_group":
            made = pycomm.new_group(step.members[0], group=parent)
        else:
            color = mine[0] if mine else None
            key = step.members[mine[0]].index(parent.rank) if mine else 0
            made = parent.split(color, key)
        if (made is not None) != bool(mine):
            raise WrongResultError(f"{step}: made {made}")
        if made is not None:
            members = step.members[mine[0]]
            if made.ranks != [parent.ranks[rank] for rank in members]:
                raise WrongResultError(f"{step}: has ranks {made.ranks}")
            self._groups[numbers[mine[0]]] = made

    def _run_threads(self, step: Threads) -> None:
        errors: list[BaseException] = []

        def run(operations: tuple[Operation, ...], group: Group) -> None:
            try:
                for operation in operations:
                    issue(operation, group)()
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(operations, self._groups[operations[0].group]))
            for operations in step.lists
            if operations[0].group in self._groups
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class _Numbered:
    """Puts a step's number in front of what is raised."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not str(error).startswith(STEP):
            raise WrongResultError(
                f"{STEP}{self._number}: {type(error).__name__}: {error}"
            ) from error


def issue(operation: Operation, group: Group) -> Finish:
    """Begin an operation; what is returned waits for it and compares."""
    return _KINDS[operation.kind](operation, group)


def _compare(operation: Operation, group: Group, got: Tensor | None, expected: Tensor) -> None:
    if got is None or got.shape != expected.shape or got.dtype != expected.dtype:
        raise WrongResultError(
            f"{operation} on rank {group.rank} of {group.ranks}: got "
            f"{None if got is None else (got.shape, got.dtype)}, expected "
            f"{(expected.shape, expected.dtype)}"
        )
    if bits(got) == bits(expected):
        return
    ours, theirs = bits(got), bits(expected)
    element = expected.element_size()
    wrong = [
        i
        for i in range(expected.numel())
        if ours[i * element : (i + 1) * element] != theirs[i * element : (i + 1) * element]
    ]
    first = wrong[0]
    raise WrongResultError(
        f"{operation} on rank {group.rank} of {group.ranks}: {len(wrong)} of {expected.numel()} "
        f"elements of {expected.dtype} are wrong, the first at {first}: "
        f"{ours[first * element : (first + 1) * element].hex()} instead of "
        f"{theirs[first * element : (first + 1) * element].hex()}"
    )


def _placed(t: Tensor, operation: Operation, group: Group) -> Tensor:
    """A copy in the kind of memory that the operation has for this rank.

    Only collectives and ``bits`` touch it: torch itself may crash on elements at odd addresses.
    """
    place = operation.places[group.rank % len(operation.places)]
    nbytes = t.numel() * t.element_size()
    if nbytes == 0 or place == "heap":
        return t.clone()
    memory = group.allocate(nbytes + 3) if "arena" in place else bytearray(nbytes + 3)
    offset = 3 if "odd" in place else 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=nbytes)
    copy.copy_(t.reshape(-1).view(torch.uint8))
    return torch.frombuffer(memory, dtype=t.dtype, offset=offset, count=t.numel()).view(t.shape)


def _call(operation: Operation, function, *arguments, **options):
    """Make a call as the operation says; what is returned waits for it."""
    started = function(*arguments, async_op=operation.wait_after is not None, **options)
    return (lambda: started) if operation.wait_after is None else started.wait


# ------------------------------------------------------------------------------------- reductions


def _options(reduction: Reduction, group: Group) -> dict:
    prescale, postscale = reduction.scales
    return {"prescale": prescale, "postscale": postscale, "group": group}


def _all_reduce(operation: Operation, group: Group) -> Finish:
    reduction = Reduction(operation, group.hosts, operation.count)
    mine = _placed(reduction.input(group.rank), operation, group)
    before = bits(mine)
    function = pycomm.all_reduce_ if operation.in_place else pycomm.all_reduce
    wait = _call(
        operation, function, mine, reduction.op, algorithm=reduction.algorithm,
        **_options(reduction, group),
    )  # fmt: skip

    def finish() -> None:
        result = wait()
        if operation.in_place:
            result = mine
        elif bits(mine) != before:
            raise WrongResultError(f"{operation} changed its input")
        _compare(operation, group, result, reduction.result())

    return finish


def _all_reduce_grouped(operation: Operation, group: Group) -> Finish:
    parts = [Reduction(operation, group.hosts, rows) for rows in (operation.count, 1, 7)]
    # torch puts them end to end, and may crash on elements at odd addresses.
    even = tuple(place.removeprefix("odd").strip() or "heap" for place in operation.places)
    operation = dataclasses.replace(operation, places=even)
    mine = [_placed(part.input(group.rank), operation, group) for part in parts]
    function = pycomm.all_reduce_grouped_ if operation.in_place else pycomm.all_reduce_grouped
    wait = _call(operation, function, mine, parts[0].op, **_options(parts[0], group))

    def finish() -> None:
        results = wait()
        for part, result in zip(parts, mine if operation.in_place else results, strict=True):
            _compare(operation, group, result, part.result())

    return finish


def _reduce(operation: Operation, group: Group) -> Finish:
    reduction = Reduction(operation, group.hosts, operation.count)
    mine = _placed(reduction.input(group.rank), operation, group)
    before = bits(mine)
    function = pycomm.reduce_ if operation.in_place else pycomm.reduce
    wait = _call(
        operation, function, mine, operation.root, reduction.op, **_options(reduction, group)
    )

    def finish() -> None:
        result = wait()
        is_root = group.rank == operation.root
        if is_root:
            result = mine if operation.in_place else result
            _compare(operation, group, result, reduction.result())
        elif not operation.in_place and result is not None:
            raise WrongResultError(f"{operation} returned something on rank {group.rank}")
        if not (is_root and operation.in_place) and bits(mine) != before:
            raise WrongResultError(f"{operation} changed the tensor of rank {group.rank}")

    return finish


def _reduce_scatter(operation: Operation, group: Group) -> Finish:
    count = operation.count // group.size
    reduction = Reduction(operation, group.hosts, count * group.size)
    own = slice(group.rank * count, (group.rank + 1) * count)
    mine = _placed(reduction.input(group.rank), operation, group)
    if operation.in_place:
        wait = _call(
            operation, pycomm.reduce_scatter_into, mine[own], mine, reduction.op,
            **_options(reduction, group),
        )  # fmt: skip
    else:
        wait = _call(
            operation, pycomm.reduce_scatter, mine, reduction.op, **_options(reduction, group)
        )

    def finish() -> None:
        result = wait()
        result = mine[own] if operation.in_place else result
        _compare(operation, group, result, reduction.result()[own])

    return finish


# ------------------------------------------------------------------------------------------ moves


def _broadcast(operation: Operation, group: Group) -> Finish:
    mine = _placed(moved(operation, group.rank, operation.count), operation, group)
    function = pycomm.broadcast_ if operation.in_place else pycomm.broadcast
    wait = _call(operation, function, mine, operation.root, group=group)

    def finish() -> None:
        result = wait()
        expected = moved(operation, operation.root, operation.count)
        _compare(operation, group, mine if operation.in_place else result, expected)

    return finish


def _all_gather(operation: Operation, group: Group) -> Finish:
    rows = operation.count // group.size
    all_rows = [moved(operation, rank, rows) for rank in range(group.size)]
    shape = (group.size, rows, operation.columns)
    expected = joined(all_rows).reshape(shape)
    if operation.in_place:
        blank = _empty_like(all_rows[0])
        others = [t if rank == group.rank else blank for rank, t in enumerate(all_rows)]
        output = _placed(joined(others).reshape(shape), operation, group)
        place = output[group.rank]
        wait = _call(operation, pycomm.all_gather_into, output, place, group=group)
    else:
        mine = _placed(all_rows[group.rank], operation, group)
        wait = _call(operation, pycomm.all_gather, mine, group=group)

    def finish() -> None:
        result = wait()
        _compare(operation, group, output if operation.in_place else result, expected)

    return finish


def _all_to_all(operation: Operation, group: Group) -> Finish:
    rows = operation.count // group.size
    brought = [moved(operation, rank, rows * group.size) for rank in range(group.size)]
    own = slice(group.rank * rows, (group.rank + 1) * rows)
    expected = joined([t[own] for t in brought])
    mine = _placed(brought[group.rank], operation, group)
    output = _placed(_empty_like(expected), operation, group)
    if operation.in_place:
        wait = _call(operation, pycomm.all_to_all_into, output, mine, group=group)
    else:
        wait = _call(operation, pycomm.all_to_all, mine, group=group)

    def finish() -> None:
        result = wait()
        _compare(operation, group, output if operation.in_place else result, expected)

    return finish


def _all_to_all_splits(operation: Operation, group: Group) -> Finish:
    table = splits(operation, group.size)
    brought = [moved(operation, rank, sum(table[rank])) for rank in range(group.size)]
    blocks = []
    for rank in range(group.size):
        begin = sum(table[rank][: group.rank])
        blocks.append(brought[rank][begin : begin + table[rank][group.rank]])
    expected = joined(blocks)
    mine = _placed(brought[group.rank], operation, group)
    theirs = [table[rank][group.rank] for rank in range(group.size)]
    learned = theirs if operation.in_place else None
    wait = _call(operation, pycomm.all_to_all, mine, table[group.rank], learned, group=group)
    return lambda: _compare(operation, group, wait(), expected)


def _gather(operation: Operation, group: Group) -> Finish:
    rows = operation.count // group.size
    brought = [moved(operation, rank, rows) for rank in range(group.size)]
    mine = _placed(brought[group.rank], operation, group)
    wait = _call(operation, pycomm.gather, mine, operation.root, group=group)

    def finish() -> None:
        result = wait()
        if group.rank == operation.root:
            shape = (group.size, rows, operation.columns)
            _compare(operation, group, result, joined(brought).reshape(shape))
        elif result is not None:
            raise WrongResultError(f"{operation} returned something on rank {group.rank}")

    return finish


def _scatter(operation: Operation, group: Group) -> Finish:
    rows = operation.count // group.size
    whole = moved(operation, operation.root, rows * group.size)
    expected = whole.view(group.size, rows, operation.columns)[group.rank]
    t = None
    if group.rank == operation.root:
        t = _placed(whole.view(group.size, rows, operation.columns), operation, group)
    output = _placed(_empty_like(expected), operation, group)
    if operation.in_place:
        wait = _call(operation, pycomm.scatter_into, output, t, operation.root, group=group)
    else:
        wait = _call(operation, pycomm.scatter, t, operation.root, group=group)

    def finish() -> None:
        result = wait()
        _compare(operation, group, output if operation.in_place else result, expected)

    return finish


def _lists(operation: Operation, group: Group) -> Finish:
    to_root = operation.kind == "gather_list"
    brought = [moved(operation, rank, rows_of_list(operation, rank)) for rank in range(group.size)]
    mine = _placed(brought[group.rank], operation, group)
    if to_root:
        wait = _call(operation, pycomm.gather_list, mine, operation.root, group=group)
    else:
        wait = _call(operation, pycomm.all_gather_list, mine, group=group)

    def finish() -> None:
        result = wait()
        if to_root and group.rank != operation.root:
            if result is not None:
                raise WrongResultError(f"{operation} returned something on rank {group.rank}")
            return
        for got, expected in zip(result, brought, strict=True):
            _compare(operation, group, got, expected)

    return finish


def _empty_like(t: Tensor) -> Tensor:
    return torch.zeros(t.shape, dtype=torch.float32).to(t.dtype)


# --------------------------------------------------------------------------------------- messages


def _tag(operation: Operation) -> int:
    return operation.random(3).randrange(3)  # few, so that messages of different steps meet


def _send(operation: Operation, group: Group, t: Tensor, dst: int, tag: int) -> Finish:
    t = _placed(t, operation, group)
    work = pycomm.isend(t, dst, tag=tag, group=group)
    return lambda: _check_unchanged(operation, work.wait, t)


def _check_unchanged(operation: Operation, wait: Finish, t: Tensor) -> None:
    before = bits(t)
    wait()
    if bits(t) != before:
        raise WrongResultError(f"{operation} changed what it sent")


def _receive(operation: Operation, group: Group, expected: Tensor, src: int, tag: int) -> Finish:
    t = _placed(_empty_like(expected), operation, group)
    work = pycomm.irecv(t, src, tag=tag, group=group)

    def finish() -> None:
        source = work.wait()
        if source != src:
            raise WrongResultError(f"{operation}: the message came from rank {source}, not {src}")
        _compare(operation, group, t, expected)

    return finish


def _both(*finishes: Finish) -> Finish:
    def finish() -> None:
        for one in finishes:
            one()

    return finish


def _message(operation: Operation, group: Group) -> Finish:
    """From the root to another rank, or to itself."""
    draw = operation.random(4)
    src, dst = operation.root, draw.randrange(group.size)
    tag = _tag(operation)
    t = moved(operation, src, operation.count)
    if group.rank not in (src, dst):
        return lambda: None
    if operation.wait_after is None and src != dst:
        if group.rank == src:
            pycomm.send(_placed(t, operation, group), dst, tag=tag, group=group)
            return lambda: None
        got = _placed(_empty_like(t), operation, group)
        source = pycomm.recv(got, src, tag=tag, group=group)
        if source != src:
            raise WrongResultError(f"{operation}: the message came from rank {source}, not {src}")
        return lambda: _compare(operation, group, got, t)
    finishes = []
    if group.rank == src:
        finishes.append(_send(operation, group, t, dst, tag))
    if group.rank == dst:
        finishes.append(_receive(operation, group, t, src, tag))
    return _both(*finishes)


def _ring(operation: Operation, group: Group) -> Finish:
    """Several to the next rank, received in the order they were sent."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    tag = _tag(operation)
    finishes = []
    for i in range(operation.random(5).randint(1, 5)):
        rows = max(0, operation.count - i)
        sent, expected = (moved(operation, rank, rows, i) for rank in (group.rank, before))
        finishes.append(_send(operation, group, sent, after, tag))
        finishes.append(_receive(operation, group, expected, before, tag))
    return _both(*finishes)


def _swap(operation: Operation, group: Group) -> Finish:
    """Everybody with everybody, each message with a tag and a size of its own, in any order."""
    draw = operation.random(6, group.rank)

    def rows(src: int, dst: int) -> int:
        return operation.random(7, src, dst).choice([0, 1, 100, operation.count])

    posts: list[Callable[[], Finish]] = []
    for other in range(group.size):
        sent = moved(operation, group.rank, rows(group.rank, other), other)
        expected = moved(operation, other, rows(other, group.rank), group.rank)
        to, back = 10 + other, 10 + group.rank
        posts.append(lambda o=other, t=sent, tag=to: _send(operation, group, t, o, tag))
        posts.append(lambda o=other, t=expected, tag=back: _receive(operation, group, t, o, tag))
    draw.shuffle(posts)
    finishes = [post() for post in posts]
    draw.shuffle(finishes)
    return _both(*finishes)


def _any_source(operation: Operation, group: Group) -> Finish:
    """Everybody to the root, which takes them as they come."""
    tag = 3 + operation.seed % (1 << 20)  # no other step's message may be taken
    root = operation.root
    if group.rank != root:
        mine = moved(operation, group.rank, operation.count)
        return _send(operation, group, mine, root, tag)
    works = []
    for _ in range(group.size - 1):
        t = _placed(torch.zeros(operation.count, operation.columns).to(moved_dtype(operation)),
                    operation, group)  # fmt: skip
        works.append((pycomm.irecv(t, None, tag=tag, group=group), t))

    def finish() -> None:
        sources = []
        for work, t in works:
            sources.append(work.wait())
            _compare(operation, group, t, moved(operation, sources[-1], operation.count))
        if sorted([*sources, root]) != list(range(group.size)):
            raise WrongResultError(f"{operation}: messages came from {sources}")

    return finish


# ----------------------------------------------------------------------------------------- others


def _barrier(operation: Operation, group: Group) -> Finish:
    wait = _call(operation, pycomm.barrier, group=group)
    return lambda: wait() and None


def _object(operation: Operation, rank: int) -> object:
    return {"rank": rank, "seed": operation.seed, "list": list(range(operation.count % 100))}


def _all_gather_object(operation: Operation, group: Group) -> Finish:
    got = pycomm.all_gather_object(_object(operation, group.rank), group=group)
    if got != [_object(operation, rank) for rank in range(group.size)]:
        raise WrongResultError(f"{operation} on rank {group.rank}: got {got}")
    return lambda: None


def _broadcast_object(operation: Operation, group: Group) -> Finish:
    got = pycomm.broadcast_object(_object(operation, group.rank), operation.root, group=group)
    if got != _object(operation, operation.root):
        raise WrongResultError(f"{operation} on rank {group.rank}: got {got}")
    return lambda: None


_KINDS: dict[str, Callable[[Operation, Group], Finish]] = {
    "all_reduce": _all_reduce,
    "all_reduce_grouped": _all_reduce_grouped,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "all_to_all_splits": _all_to_all_splits,
    "gather": _gather,
    "scatter": _scatter,
    "gather_list": _lists,
    "all_gather_list": _lists,
    "message": _message,
    "ring": _ring,
    "swap": _swap,
    "any_source": _any_source,
    "barrier": _barrier,
    "all_gather_object": _all_gather_object,
    "broadcast_object": _broadcast_object,
}
