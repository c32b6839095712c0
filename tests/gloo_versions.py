"""What older versions of gloo, with which pycomm is compared, cannot do."""

import torch

# Before (seen with torch 2.9) it ends the process on some bad input, which later versions refuse
# (ProcessGroupGloo.cpp, "Check failed"), and in torch's pipelines (gloo's pair.cc).
SURVIVES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 10)
