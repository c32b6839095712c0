"""The compressors' CUDA kernels in Numba's simulator: a program that test_compression.py starts.

No GPU: each thread of a kernel is a thread of Python. Prints a line for what it has compared.
"""

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # read when numba is imported

import numpy as np
from compressors import COMPRESSORS, Team, numbers

COUNT = 300  # a block, and some of another


def check(name: str) -> None:
    on_host = Team(COMPRESSORS[name], 2)
    simulated = Team(COMPRESSORS[name], 2, stream=0)
    for step in range(2):
        gradients = [numbers(COUNT, 10 * step + rank) for rank in range(2)]
        if step == 0:
            gradients[0][:2] = [1e6, -1e6]
            gradients[1][[260, 270, 290]] = [np.nan, -np.inf, np.inf]
        expected = on_host.exchange(gradients)
        np.testing.assert_array_equal(simulated.exchange(gradients), expected)
        if "residual" in on_host.buckets[0].memory:
            for rank in range(2):
                np.testing.assert_array_equal(
                    simulated.residual(rank, 512), on_host.residual(rank, 512)
                )
    print(f"{name}: {COUNT} elements of 2 ranks, 2 steps")


if __name__ == "__main__":
    with np.errstate(invalid="ignore"):
        for name in ("float16", "int8", "top_k"):
            check(name)
