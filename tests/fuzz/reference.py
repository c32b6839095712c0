"""What every rank brings to an operation and gets from it, by NumPy."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from fuzz.program import Operation
from pycomm import ReduceOp
from pycomm.arguments import MOVABLE, REDUCIBLE

FOLDS = {
    ReduceOp.SUM: np.add,
    ReduceOp.AVG: np.add,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.PROD: np.multiply,
    ReduceOp.BAND: np.bitwise_and,
    ReduceOp.BOR: np.bitwise_or,
    ReduceOp.BXOR: np.bitwise_xor,
}
_BITWISE = (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)
# Of what is folded in a wider type than its own.
_ACCUMULATORS = {torch.float16: np.float32, torch.bfloat16: np.float32}
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def bits(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --------------------------------------------------------------------------------------- reductions


class Reduction:
    """Of ``rows`` rows on every rank.

    Half of those of floats have whole numbers, whose results are exact in any order. The others
    must be rounded: they equal a sequential fold in the canonical order (the ranks of a host, then
    the hosts), in the accumulator, rounded once, bit for bit.
    """

    def __init__(self, operation: Operation, hosts: list[list[int]], rows: int) -> None:
        draw = operation.random()
        self._operation = operation
        self._hosts = hosts
        self._ranks = sum(map(len, hosts))
        self._shape = (rows, operation.columns)
        self.dtype = draw.choice(list(REDUCIBLE))
        self.op = draw.choice([op for op in FOLDS if _can_reduce(self.dtype, op)])
        self.scales = (1.0, 1.0)
        if (self.dtype.is_floating_point or self.dtype.is_complex) and draw.random() < 0.3:
            self.scales = draw.choice([(0.5, 1.0), (1.0, 0.25), (2.0, 0.5)])  # exact factors
        self._rounded = self.dtype.is_floating_point and draw.random() < 0.5
        # The ring folds in an order of its own.
        self.algorithm = draw.choice(
            [None, "direct"] if self._rounded else [None, "direct", "ring"]
        )

    def input(self, rank: int) -> Tensor:
        return _as_tensor(self._values(rank), self.dtype)

    def result(self) -> Tensor:
        wide = self._wide()
        inputs = [self._values(rank).astype(wide) for rank in range(self._ranks)]
        prescale, postscale = self.scales
        if prescale != 1:
            inputs = [values * wide(prescale) for values in inputs]
        fold = FOLDS[self.op]
        sums = [functools.reduce(fold, [inputs[rank] for rank in host]) for host in self._hosts]
        result = functools.reduce(fold, sums)
        if self.op is ReduceOp.AVG:
            result = result / wide(self._ranks)
        if postscale != 1:
            result = result * wide(postscale)
        return _as_tensor(result, self.dtype)

    def _wide(self) -> type:
        if self.dtype.is_complex:
            return np.complex128
        if self._rounded:
            return _ACCUMULATORS.get(self.dtype) or _NUMPY[self.dtype]
        if self.dtype.is_floating_point:
            return np.float64
        return bool if self.dtype is torch.bool else np.int64

    def _values(self, rank: int) -> np.ndarray:
        draw = np.random.default_rng((self._operation.seed, rank))
        if self._rounded:
            values = torch.from_numpy(draw.standard_normal(self._shape)).to(self.dtype)
            return values.to(torch.float64).numpy()  # the very values
        if self.dtype is torch.bool:
            return draw.integers(0, 2, self._shape).astype(bool)
        if self.op is ReduceOp.PROD and self.dtype.is_floating_point:
            return draw.choice([-1.0, 1.0, 2.0], self._shape)
        values = draw.integers(0 if self.dtype is torch.uint8 else -3, 4, self._shape)
        if self.op is ReduceOp.AVG:
            values = values * self._ranks  # the average is whole
        if self.dtype.is_complex:
            return values + 1j * draw.integers(-3, 4, self._shape) * self._ranks
        return values


def _can_reduce(dtype: torch.dtype, op: ReduceOp) -> bool:
    if dtype.is_complex:
        return op in (ReduceOp.SUM, ReduceOp.AVG)
    return op not in _BITWISE if dtype.is_floating_point else op is not ReduceOp.AVG


def _as_tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


# -------------------------------------------------------------------------------------------- moves


def moved_dtype(operation: Operation) -> torch.dtype:
    return operation.random().choice(list(MOVABLE))


def moved(operation: Operation, rank: int, rows: int, *more: int) -> Tensor:
    """Any bytes, of ``rows`` rows."""
    dtype = moved_dtype(operation)
    draw = np.random.default_rng((operation.seed, rank, *more))
    limit = 2 if dtype is torch.bool else 256
    nbytes = rows * operation.columns * dtype.itemsize
    flat = torch.empty(nbytes, dtype=torch.uint8)
    flat.copy_(torch.from_numpy(draw.integers(0, limit, (nbytes,), dtype=np.uint8)))
    return flat.view(dtype).reshape(rows, operation.columns)


def joined(blocks: list[Tensor]) -> Tensor:
    """End to end along dimension 0; bytes, since torch cannot concatenate every dtype."""
    flat = torch.cat([block.contiguous().reshape(-1).view(torch.uint8) for block in blocks])
    rows = sum(len(block) for block in blocks)
    return flat.view(blocks[0].dtype).reshape(rows, *blocks[0].shape[1:])


def splits(operation: Operation, p: int) -> list[list[int]]:
    """Rows from each rank to each; some of them none."""
    draw = operation.random(1)
    most = max(3, operation.count // p)
    return [[draw.choice([0, draw.randint(0, most)]) for _ in range(p)] for _ in range(p)]


def rows_of_list(operation: Operation, rank: int) -> int:
    return operation.random(2, rank).choice([0, 1, operation.count, operation.count // 2 + 1])
