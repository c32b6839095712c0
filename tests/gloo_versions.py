"""What older versions of gloo, with which pycomm is compared, cannot do."""

import torch

_TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])

# With torch 2.9 it ends the process on some bad input, which later versions refuse
# (ProcessGroupGloo.cpp, "Check failed").
REFUSES_BAD_INPUT = _TORCH >= (2, 10)

# With 2.9 it ends the process in torch's pipelines, with 2.10 it loses connections in zero-bubble
# ones (gloo's pair.cc); 2.11 was not tried.
RUNS_PIPELINES = _TORCH >= (2, 12)
