"""What runs on GPUs, a process each, started by ``make gpu-check`` under torchrun.

With PYCOMM_GPU_CHECK=cpu the same tests take CPU tensors: a self-check of the tests, not of GPUs.
"""

from collections.abc import Iterator

import pytest
import torch
from mode import ON_GPUS

import pycomm


@pytest.fixture(scope="session", autouse=True)
def world() -> Iterator[None]:
    pycomm.init(timeout_s=60)
    if ON_GPUS:
        torch.cuda.set_device(pycomm.local_rank())
    yield
    pycomm.shutdown()


@pytest.fixture
def device() -> torch.device:
    """This rank's GPU; in the self-check the CPU."""
    return torch.device("cuda", pycomm.local_rank()) if ON_GPUS else torch.device("cpu")
