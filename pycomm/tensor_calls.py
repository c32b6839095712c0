"""Collectives on ordinary tensors in one call from Python to the core."""

import torch

from pycomm import _core

# all_reduce_(group, t, op): False, and nothing done, unless `t` needs no preparation.
all_reduce_ = _core.tensor_all_reduce_(
    torch.Tensor,
    torch.Tensor.is_neg,
    torch._C._increment_version,
)
