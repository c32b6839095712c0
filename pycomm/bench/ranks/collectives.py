"""A contender's answers to requests for samples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .measure import Bench, Contender, Samples
from .turns import Request, pin, serve

Make = Callable[[Contender, str, str, int], Samples]


class Sampler:
    """Keeps the memory of the size being measured; the next size replaces it."""

    def __init__(self, contender: Contender, make: Make) -> None:
        self.contender = contender
        self.make = make
        self._key: tuple[str, int] | None = None
        self._benches: dict[str, Samples] = {}

    def samples(self, variant: str, collective: str, nbytes: int, repeat: int) -> list[float]:
        if self._key != (collective, nbytes):
            self._key, self._benches = (collective, nbytes), {}
        if variant not in self._benches:
            self._benches[variant] = self.make(self.contender, variant, collective, nbytes)
        return self._benches[variant].samples(repeat)


def main(contender: Contender, make: Make = Bench) -> None:
    """Serve at the address in the last argument."""
    pin(contender.rank, contender.size)
    sampler = Sampler(contender, make)

    def answer(request: Request) -> Any:
        return sampler.samples(**request)

    hello = {
        "rank": contender.rank,
        "variants": list(contender.variants()),
        "version": contender.version(),
    }
    serve(sys.argv[-1], hello, answer)
