"""What DistributedDataParallel's reducer is given of a ``Work`` outlives the Python object.

The reducer's C++ code keeps the C++ half of the ``Work`` by which the ranks under ``Join`` count
those of them that are still at work. The Python half, which alone knows how to wait, is gone when
forward returns, and the other half would wait for ever. So the reducer gets a ``Work`` of torch's
own, around the future.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future

from pycomm.torch_backend.work import Work


def keep_works_of_forward() -> None:
    """Once for each process."""
    name = "_set_forward_pass_work_handle"
    keep: Callable[..., None] = getattr(dist.Reducer, name)

    @functools.wraps(keep)
    def keep_whole(reducer: Any, work: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(work, Work):
            work = _create_work_from_future(work.get_future())
        keep(reducer, work, *args, **kwargs)

    setattr(dist.Reducer, name, keep_whole)
