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
from pycomm.groups import new_group
from pycomm.join import join
from pycomm.mesh import Mesh
from pycomm.objects import all_gather_object, broadcast_object
from pycomm.optimizer import DistributedOptimizer
from pycomm.point_to_point import (
    P2POp,
    batch_isend_irecv,
    irecv,
    isend,
    recv,
    recv_object,
    send,
    send_object,
)
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
    "Mesh",
    "MismatchError",
    "NotInitializedError",
    "P2POp",
    "PeerLostError",
    "ReduceOp",
    "Work",
    "all_gather",
    "all_gather_into",
    "all_gather_object",
    "all_reduce",
    "all_reduce_",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "host_rank",
    "host_size",
    "hosts",
    "init",
    "irecv",
    "is_initialized",
    "isend",
    "join",
    "local_rank",
    "local_size",
    "new_group",
    "rank",
    "recv",
    "recv_object",
    "send",
    "send_object",
    "shutdown",
    "size",
]
