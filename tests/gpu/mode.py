"""Whether the tests of this folder run on GPUs, or check themselves on CPU tensors."""

import os

import pytest

ON_GPUS = os.environ.get("PYCOMM_GPU_CHECK") == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPUS, reason="the self-check has no GPU")
