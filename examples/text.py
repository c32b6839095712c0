"""Real text that is on every machine, as bytes: the sources of Python's standard library."""

import os
from pathlib import Path

import torch
from torch import Tensor

FIRST_BATCH_OF_TEST = 1 << 40  # numbers of batches beyond all steps


class Text:
    """Batches are a function of their number alone: any layout of ranks sees the same."""

    def __init__(self, context: int) -> None:
        self._context = context
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        content = b"\n".join(file.read_bytes() for file in files)
        self._bytes = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._test_begin = len(content) * 9 // 10

    def batch(self, number: int, rows: int, *, test: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs and, for each byte, the next one; both of shape ``(rows, context)``."""
        generator = torch.Generator().manual_seed(number + (FIRST_BATCH_OF_TEST if test else 0))
        first, last = (self._test_begin, len(self._bytes)) if test else (0, self._test_begin)
        begins = torch.randint(first, last - self._context - 1, (rows, 1), generator=generator)
        passages = self._bytes[begins + torch.arange(self._context + 1)].long()
        return passages[:, :-1], passages[:, 1:]
