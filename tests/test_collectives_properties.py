"""Every collective equals its NumPy reference, bit for bit.

Hypothesis draws lists of cases; one world runs a whole list, since making worlds costs more than
the calls. Reductions get whole numbers whose results are exact in every dtype and order, moves get
random bytes.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from collective_cases import DTYPES_AND_OPS, can_reduce, layout_id
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from run_ranks import run_ranks
from torch import Tensor

import pycomm
from pycomm import ReduceOp
from pycomm._core import Group
from pycomm.arguments import MOVABLE
from pycomm.runtime import world_group

# The host of each rank: worlds of 1 to 5 and 8 ranks.
LAYOUTS = [
    [0],
    [0, 0],
    [0, 1],
    [0, 0, 0],
    [0, 1, 2],
    [0, 0, 0, 0],
    [0, 0, 1, 1],
    [0, 0, 0, 1],
    [0, 1, 0, 1],
    [0] * 5,
    [0, 1, 1, 0, 2],
    [0] * 8,
    [0, 0, 0, 0, 1, 1, 1, 1],
]
PIECE_BYTES = 1024  # of staging: 1500 elements are many pieces
CASES_PER_WORLD = 12
PLACES = ["heap", "odd", "arena", "odd arena"]  # odd: three bytes behind a boundary
NUMPY_FOLDS = {
    ReduceOp.SUM: np.add,
    ReduceOp.AVG: np.add,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.PROD: np.multiply,
    ReduceOp.BAND: np.bitwise_and,
    ReduceOp.BOR: np.bitwise_or,
    ReduceOp.BXOR: np.bitwise_xor,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What all ranks do; ranks lie at ``places[rank % len(places)]`` in memory."""

    call: str
    dtype: torch.dtype
    op: ReduceOp
    size: int  # counts below 3 stand for p - 1, p, p + 1: see count()
    columns: int
    root: int
    places: tuple[str, ...]
    async_op: bool
    prescale: float
    postscale: float
    seed: int

    def count(self, p: int) -> int:
        return {-1: p - 1, -2: p, -3: p + 1}.get(self.size, self.size)

    def random(self, rank: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, rank))

    def done(self, result):
        return result.wait() if self.async_op else result


def cases_of(calls, dtypes_and_ops):
    def case(call, dtype_and_op, size, columns, root, places, async_op, scales, seed):
        dtype, op = dtype_and_op
        scalable = dtype.is_floating_point or dtype.is_complex
        prescale, postscale = scales if scalable else (1.0, 1.0)
        return Case(
            call, dtype, op, size, columns, root, places, async_op, prescale, postscale, seed
        )

    return st.builds(
        case,
        st.sampled_from(calls),
        st.sampled_from(dtypes_and_ops),
        st.sampled_from([0, 1, -1, -2, -3, 37, 1500]),
        st.sampled_from([1, 1, 3]),
        st.integers(0, 7),
        st.lists(st.sampled_from(PLACES), min_size=1, max_size=3).map(tuple),
        st.booleans(),
        st.sampled_from([(1.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (2.0, 0.5)]),
        st.integers(0, 2**31),
    )


# ------------------------------------------------------------------------------------ references


def whole_numbers(case: Case, rank: int, p: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rank ``rank``'s input as int64, float64 or complex128."""
    random = case.random(rank)
    if case.dtype is torch.bool:
        return random.integers(0, 2, shape).astype(bool)
    if case.op is ReduceOp.PROD and case.dtype.is_floating_point:
        return random.choice([-1.0, 1.0, 2.0], shape)  # products up to 2^8
    low = 0 if case.dtype is torch.uint8 else -3
    values = random.integers(low, 4, shape)
    if case.op is ReduceOp.AVG:
        values = values * p  # what is divided by p stays whole
    if case.dtype.is_complex:
        return values + 1j * random.integers(-3, 4, shape) * p
    if not case.dtype.is_floating_point:
        return values
    values = values.astype(np.float64)
    if case.op in (ReduceOp.MIN, ReduceOp.MAX):
        values[random.random(shape) < 0.05] = np.nan
    return values


def folded(case: Case, inputs: list[np.ndarray]) -> Tensor:
    fold = NUMPY_FOLDS[case.op]
    scaled = case.prescale != 1 or case.postscale != 1
    result = inputs[0] * case.prescale if scaled else inputs[0]
    for values in inputs[1:]:
        result = fold(result, values * case.prescale if scaled else values)
    if case.op is ReduceOp.AVG:
        result = result / len(inputs)
    if scaled:
        result = result * case.postscale
    return as_tensor(result, case.dtype)


def as_tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def random_bytes(case: Case, rank: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rank ``rank``'s elements as bytes, of shape ``(*shape, bytes of an element)``."""
    limit = 2 if case.dtype is torch.bool else 256
    return case.random(rank).integers(0, limit, (*shape, case.dtype.itemsize), dtype=np.uint8)


def of_bytes(elements: np.ndarray, dtype: torch.dtype) -> Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(elements).reshape(-1))
    return flat.view(dtype).reshape(elements.shape[:-1])


def bits(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()  # moves bytes alone


def placed(t: Tensor, case: Case, group: Group) -> Tensor:
    """A copy of ``t`` in the kind of memory that the case has for this rank.

    Only collectives and ``bits`` touch it: torch itself may crash on elements at odd addresses.
    """
    place = case.places[group.rank % len(case.places)]
    nbytes = t.numel() * t.element_size()
    if nbytes == 0 or place == "heap":
        return t.clone()
    memory = group.allocate(nbytes + 3) if "arena" in place else bytearray(nbytes + 3)
    offset = 3 if "odd" in place else 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=nbytes)
    copy.copy_(t.reshape(-1).view(torch.uint8))
    return torch.frombuffer(memory, dtype=t.dtype, offset=offset, count=t.numel()).view(t.shape)


def assert_equal(actual: Tensor, expected: Tensor, what: object) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if bits(actual) != bits(expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=str(what))


# ----------------------------------------------------------------- one function for each collective


def check_all_reduce(case: Case, group: Group) -> Tensor:
    p = group.size
    inputs = [whole_numbers(case, rank, p, (case.count(p), case.columns)) for rank in range(p)]
    expected = folded(case, inputs)
    mine = placed(as_tensor(inputs[group.rank], case.dtype), case, group)
    before = bits(mine)
    options = {"prescale": case.prescale, "postscale": case.postscale, "group": group}
    result = case.done(pycomm.all_reduce(mine, case.op, async_op=case.async_op, **options))
    assert_equal(result, expected, case)
    assert bits(mine) == before, f"{case} changed its input"

    case.done(pycomm.all_reduce_(mine, case.op, async_op=case.async_op, **options))
    assert bits(mine) == bits(result), case
    return mine


def check_reduce(case: Case, group: Group) -> None:
    p = group.size
    root = case.root % p
    inputs = [whole_numbers(case, rank, p, (case.count(p), case.columns)) for rank in range(p)]
    expected = folded(case, inputs)
    mine = placed(as_tensor(inputs[group.rank], case.dtype), case, group)
    before = bits(mine)
    options = {"prescale": case.prescale, "postscale": case.postscale, "group": group}
    result = case.done(pycomm.reduce(mine, root, case.op, async_op=case.async_op, **options))
    assert bits(mine) == before, f"{case} changed its input"
    case.done(pycomm.reduce_(mine, root, case.op, async_op=case.async_op, **options))
    if group.rank == root:
        assert_equal(result, expected, case)
        assert_equal(mine, expected, case)
    else:
        assert result is None
        assert bits(mine) == before, f"{case} changed a rank's tensor that is not the root"


def check_reduce_scatter(case: Case, group: Group) -> None:
    p, k = group.size, case.count(group.size)
    inputs = [whole_numbers(case, rank, p, (p * k, case.columns)) for rank in range(p)]
    own = slice(group.rank * k, (group.rank + 1) * k)
    expected = folded(case, inputs)[own]
    mine = placed(as_tensor(inputs[group.rank], case.dtype), case, group)
    before = bits(mine)
    options = {"prescale": case.prescale, "postscale": case.postscale, "group": group}
    result = case.done(pycomm.reduce_scatter(mine, case.op, async_op=case.async_op, **options))
    assert_equal(result, expected, case)
    assert bits(mine) == before, f"{case} changed its input"

    output = placed(torch.zeros_like(expected), case, group)
    for target in (output, mine[own]):  # the last one in place
        work = pycomm.reduce_scatter_into(target, mine, case.op, async_op=case.async_op, **options)
        case.done(work)
        assert_equal(target, expected, case)
    size = len(before) // p  # bytes of a shard
    begin, end = group.rank * size, (group.rank + 1) * size
    after = bits(mine)
    assert after[:begin] == before[:begin], f"{case} changed more than its shard"
    assert after[end:] == before[end:], f"{case} changed more than its shard"


def check_broadcast(case: Case, group: Group) -> None:
    p = group.size
    root = case.root % p
    shape = (case.count(p), case.columns)
    expected = of_bytes(random_bytes(case, root, shape), case.dtype)
    mine = placed(of_bytes(random_bytes(case, group.rank, shape), case.dtype), case, group)
    result = case.done(pycomm.broadcast(mine, root, group=group, async_op=case.async_op))
    assert bits(result) == bits(expected), case
    case.done(pycomm.broadcast_(mine, root, group=group, async_op=case.async_op))
    assert bits(mine) == bits(expected), case


def check_all_gather(case: Case, group: Group) -> None:
    p = group.size
    shape = (case.count(p), case.columns)
    elements = [random_bytes(case, rank, shape) for rank in range(p)]
    expected = of_bytes(np.stack(elements), case.dtype)
    mine = placed(of_bytes(elements[group.rank], case.dtype), case, group)
    result = case.done(pycomm.all_gather(mine, group=group, async_op=case.async_op))
    assert (result.shape, bits(result)) == (expected.shape, bits(expected)), case
    output = placed(torch.zeros_like(expected), case, group)
    case.done(pycomm.all_gather_into(output, mine, group=group, async_op=case.async_op))
    assert bits(output) == bits(expected), case
    only_mine = [values if r == group.rank else values * 0 for r, values in enumerate(elements)]
    output = placed(of_bytes(np.stack(only_mine), case.dtype), case, group)
    place = output[group.rank]
    case.done(pycomm.all_gather_into(output, place, group=group, async_op=case.async_op))
    assert bits(output) == bits(expected), f"{case} in place"


def shape_of(case: Case, rank: int, p: int) -> tuple[int, ...]:
    """A shape of its own for each rank, of 0 to 3 dimensions."""
    random = case.random(1000 + rank)
    shapes = [(), (case.count(p),), (0, 4), (2, case.columns, 3), (int(random.integers(0, 600)),)]
    return shapes[random.integers(len(shapes))]


def check_lists(case: Case, group: Group) -> None:
    p = group.size
    root = case.root % p
    shapes = [shape_of(case, rank, p) for rank in range(p)]
    expected = [of_bytes(random_bytes(case, r, shapes[r]), case.dtype) for r in range(p)]
    mine = placed(expected[group.rank], case, group)
    everywhere = case.done(pycomm.all_gather_list(mine, group=group, async_op=case.async_op))
    on_root = case.done(pycomm.gather_list(mine, root, group=group, async_op=case.async_op))
    assert (on_root is not None) == (group.rank == root)
    for lists in filter(None, (everywhere, on_root)):
        assert [t.shape for t in lists] == [t.shape for t in expected], case
        assert [bits(t) for t in lists] == [bits(t) for t in expected], case


def check_gather(case: Case, group: Group) -> None:
    p = group.size
    root = case.root % p
    shape = (case.count(p), case.columns)
    elements = [random_bytes(case, rank, shape) for rank in range(p)]
    mine = placed(of_bytes(elements[group.rank], case.dtype), case, group)
    result = case.done(pycomm.gather(mine, root, group=group, async_op=case.async_op))
    if group.rank != root:
        assert result is None
        return
    expected = of_bytes(np.stack(elements), case.dtype)
    assert (result.shape, bits(result)) == (expected.shape, bits(expected)), case


def check_scatter(case: Case, group: Group) -> None:
    p = group.size
    root = case.root % p
    rows = random_bytes(case, root, (p, case.count(p), case.columns))
    expected = of_bytes(rows[group.rank], case.dtype)
    t = placed(of_bytes(rows, case.dtype), case, group) if group.rank == root else None
    result = case.done(pycomm.scatter(t, root, group=group, async_op=case.async_op))
    assert (result.shape, bits(result)) == (expected.shape, bits(expected)), case
    output = placed(torch.zeros_like(expected), case, group)
    targets = [output, output if t is None else t[root]]  # the last one in place
    for target in targets:
        case.done(pycomm.scatter_into(target, t, root, group=group, async_op=case.async_op))
        assert bits(target) == bits(expected), case
    if t is not None:
        assert bits(t) == bits(of_bytes(rows, case.dtype)), f"{case} changed its input"


def check_all_to_all(case: Case, group: Group) -> None:
    p, k = group.size, case.count(group.size)
    elements = [random_bytes(case, rank, (p * k, case.columns)) for rank in range(p)]
    own = slice(group.rank * k, (group.rank + 1) * k)
    expected = of_bytes(np.concatenate([sent[own] for sent in elements]), case.dtype)
    mine = placed(of_bytes(elements[group.rank], case.dtype), case, group)
    result = case.done(pycomm.all_to_all(mine, group=group, async_op=case.async_op))
    assert (result.shape, bits(result)) == (expected.shape, bits(expected)), case
    output = placed(torch.zeros_like(expected), case, group)
    case.done(pycomm.all_to_all_into(output, mine, group=group, async_op=case.async_op))
    assert bits(output) == bits(expected), case


def check_all_to_all_splits(case: Case, group: Group) -> None:
    p, rank = group.size, group.rank
    most = max(case.count(p) // p, 3)
    splits = case.random(1000).integers(0, most, (p, p))  # rows from one rank to another
    rows = [random_bytes(case, r, (int(splits[r].sum()), case.columns)) for r in range(p)]
    starts = np.concatenate([np.zeros((p, 1), int), splits.cumsum(axis=1)], axis=1)
    blocks = [rows[r][starts[r, rank] : starts[r, rank + 1]] for r in range(p)]
    expected = of_bytes(np.concatenate(blocks), case.dtype)
    mine = placed(of_bytes(rows[rank], case.dtype), case, group)
    there, back = splits[rank].tolist(), splits[:, rank].tolist()
    for learned in (None, back):
        work = pycomm.all_to_all(mine, there, learned, group=group, async_op=case.async_op)
        result = case.done(work)
        assert (result.shape, bits(result)) == (expected.shape, bits(expected)), case
    output = placed(torch.zeros_like(expected), case, group)
    work = pycomm.all_to_all_into(output, mine, there, back, group=group, async_op=case.async_op)
    case.done(work)
    assert bits(output) == bits(expected), case


REDUCTIONS = {
    "all_reduce": check_all_reduce,
    "reduce": check_reduce,
    "reduce_scatter": check_reduce_scatter,
}
MOVES = {
    "broadcast": check_broadcast,
    "all_gather": check_all_gather,
    "lists": check_lists,
    "gather": check_gather,
    "scatter": check_scatter,
    "all_to_all": check_all_to_all,
    "all_to_all splits": check_all_to_all_splits,
}


def check_reductions(cases: list[Case], group: Group) -> list[bytes]:
    """The bits of every case's result, for ranks to agree on."""
    results = [REDUCTIONS[case.call](case, group) for case in cases]
    return [bits(result) for result in results if result is not None]


def check_moves(cases: list[Case], group: Group) -> None:
    for case in cases:
        MOVES[case.call](case, group)


def check_shards_law(case: Case, group: Group) -> None:
    """all_reduce = all_gather of reduce_scatter, and reduce, bit for bit, with sums that round."""
    p, k = group.size, case.count(group.size)
    generator = torch.Generator().manual_seed(case.seed + group.rank)
    dtype = case.dtype if case.dtype.is_floating_point else torch.float32
    t = torch.randn(p * k, generator=generator).to(dtype)
    op = case.op if can_reduce(dtype, case.op) else ReduceOp.SUM
    options = {"prescale": case.prescale, "postscale": case.postscale, "group": group}
    whole = pycomm.all_reduce(t, op, **options)
    shards = pycomm.all_gather(pycomm.reduce_scatter(t, op, **options), group=group)
    assert bits(whole) == bits(shards.flatten(0, 1)), case
    on_root = pycomm.reduce(t, case.root % p, op, **options)
    assert on_root is None or bits(on_root) == bits(whole), case


def list_of(strategy):
    return st.lists(strategy, min_size=CASES_PER_WORLD, max_size=CASES_PER_WORLD)


reductions = list_of(cases_of(list(REDUCTIONS), DTYPES_AND_OPS))
moves = list_of(cases_of(list(MOVES), [(dtype, ReduceOp.SUM) for dtype in MOVABLE]))
# A failure shows its case; shrinking a list of them would take minutes.
examples = settings(max_examples=8, phases=[Phase.generate])


@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
@examples
@given(cases=reductions)
def test_reductions_equal_numpy(hosts, cases):
    results = run_ranks(
        len(hosts),
        lambda group: check_reductions(cases, group),
        hosts=hosts,
        piece_bytes=PIECE_BYTES,
    )
    assert all(result == results[0] for result in results), "ranks disagree"


@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
@examples
@given(cases=moves)
def test_moves_equal_numpy(hosts, cases):
    run_ranks(
        len(hosts), lambda group: check_moves(cases, group), hosts=hosts, piece_bytes=PIECE_BYTES
    )


@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
@settings(examples, max_examples=3)
@given(cases=reductions)
def test_an_all_reduce_is_a_gathered_reduce_scatter(hosts, cases):
    def body(group):
        for case in cases:
            check_shards_law(case, group)

    run_ranks(len(hosts), body, hosts=hosts, piece_bytes=PIECE_BYTES)


def test_the_references_are_exact():
    """Whole numbers survive their dtype: otherwise equality would test the reference's rounding."""
    for dtype, op in DTYPES_AND_OPS:
        case = Case("all_reduce", dtype, op, 37, 1, 0, ("heap",), False, 1.0, 1.0, seed=1)
        inputs = [whole_numbers(case, rank, 8, (37,)) for rank in range(8)]
        result = folded(case, inputs)
        if dtype.is_floating_point or dtype.is_complex:
            wide = folded(dataclasses.replace(case, dtype=torch.complex128), inputs)
            assert torch.equal(result.to(torch.complex128).nan_to_num(), wide.nan_to_num())
            assert not math.isinf(result.abs().nan_to_num().max())


@pytest.mark.mpi
@settings(examples, max_examples=15)
@given(cases=reductions)
def test_reductions_of_processes(cases):
    pycomm.init()
    results = pycomm.all_gather_object(check_reductions(cases, world_group()))
    assert all(result == results[0] for result in results), "ranks disagree"


@pytest.mark.mpi
@settings(examples, max_examples=15)
@given(cases=moves)
def test_moves_of_processes(cases):
    pycomm.init()
    check_moves(cases, world_group())
