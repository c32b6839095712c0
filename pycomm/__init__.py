"""Collective communication and gradient synchronisation for PyTorch.

Importing starts nothing: no thread, no MPI. ``init()`` joins the other ranks.
"""

from pycomm._core import Group, ReduceOp
from pycomm.collectives import (
    all_gather,
    all_gather_into,
    all_reduce,
    all_reduce_,
    barrier,
    broadcast,
    broadcast_,
)
from pycomm.errors import (
    CommError,
    CommTimeoutError,
    InvalidArgumentError,
    MismatchError,
    NotInitializedError,
    PeerLostError,
)
from pycomm.join import join
from pycomm.objects import all_gather_object, broadcast_object
from pycomm.optimizer import DistributedOptimizer
from pycomm.runtime import (
    host_rank,
    host_size,
    hosts,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from pycomm.state import broadcast_optimizer_state, broadcast_parameters
from pycomm.work import Work

__all__ = [
    "CommError",
    "CommTimeoutError",
    "DistributedOptimizer",
    "Group",
    "InvalidArgumentError",
    "MismatchError",
    "NotInitializedError",
    "PeerLostError",
    "ReduceOp",
    "Work",
    "all_gather",
    "all_gather_into",
    "all_gather_object",
    "all_reduce",
    "all_reduce_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "host_rank",
    "host_size",
    "hosts",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]
