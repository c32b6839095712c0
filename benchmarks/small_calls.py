"""What does one call from Python cost, from 4 bytes on? Behind benchmarks/README.md, "Checks".

mpirun -np 2 python benchmarks/small_calls.py

Prints the median microseconds of a call over five loops, for ``all_reduce_`` of float32 and for
``send`` and ``recv`` (half of a round trip). It takes only what older versions have: run it with
two builds in turn to compare them.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

import pycomm

_LOOPS = 5
_CALLS = {1: 4000, 1024: 3000, 16384: 1500, 262144: 200, 4194304: 15}  # of a loop, by elements
_ROUND_TRIPS = 1500


def microseconds(call: Callable[[], object], count: int) -> float:
    """The median of the loops, for each call of the loop."""
    for _ in range(count // 5 + 1):
        call()
    found = []
    for _ in range(_LOOPS):
        pycomm.barrier()
        began = time.perf_counter()
        for _ in range(count):
            call()
        found.append((time.perf_counter() - began) / count * 1e6)
    return statistics.median(found)


def round_trip(x: torch.Tensor) -> None:
    if pycomm.rank() == 0:
        pycomm.send(x, 1)
        pycomm.recv(x, 1)
    elif pycomm.rank() == 1:
        pycomm.recv(x, 0)
        pycomm.send(x, 0)


def main() -> None:
    pycomm.init()
    if pycomm.size() < 2:
        sys.exit("Start at least two ranks: mpirun -np 2 python benchmarks/small_calls.py")
    lines = []
    for elements, count in _CALLS.items():
        x = torch.ones(elements)
        taken = microseconds(lambda x=x: pycomm.all_reduce_(x), count)  # type: ignore[misc]
        lines.append(f"all_reduce_ of {4 * elements} B: {taken:.2f} us")
    for elements in (1, 4096):
        x = torch.ones(elements)
        taken = microseconds(lambda x=x: round_trip(x), _ROUND_TRIPS)  # type: ignore[misc]
        lines.append(f"message of {4 * elements} B: {taken / 2:.2f} us")
    if pycomm.rank() == 0:
        print("\n".join(lines))
    pycomm.shutdown()


if __name__ == "__main__":
    main()
