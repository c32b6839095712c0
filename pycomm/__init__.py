"""Collective communication and gradient synchronisation for PyTorch.

Importing starts nothing: no thread, no MPI. ``init()`` joins the other ranks.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pycomm import compression, pipeline, tensor_parallel
from pycomm._core import Algorithm, Group, ReduceOp
from pycomm.clipping import clip_grad_norm_
from pycomm.collectives import (
    all_gather,
    all_gather_grouped,
    all_gather_into,
    all_gather_list,
    all_reduce,
    all_reduce_,
    all_reduce_grouped,
    all_reduce_grouped_,
    all_to_all,
    all_to_all_into,
    barrier,
    broadcast,
    broadcast_,
    broadcast_grouped_,
    gather,
    gather_list,
    reduce,
    reduce_,
    reduce_scatter,
    reduce_scatter_grouped,
    reduce_scatter_into,
    scatter,
    scatter_into,
)
from pycomm.errors import (
    CommError,
    CommTimeoutError,
    DriftError,
    InvalidArgumentError,
    MismatchError,
    NonFiniteError,
    NonFiniteGradient,
    NotInitializedError,
    PeerLostError,
    StageError,
)
from pycomm.grad_scaler import GradScaler
from pycomm.groups import new_group
from pycomm.join import join
from pycomm.mesh import Mesh
from pycomm.objects import all_gather_object, broadcast_object, gather_object, scatter_object
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
from pycomm.replicas import verify_replicas
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
from pycomm.sharded_optimizer import ShardedOptimizer
from pycomm.state import broadcast_optimizer_state, broadcast_parameters
from pycomm.work import Work

if TYPE_CHECKING:
    from pycomm import checkpoint, elastic

__all__ = [
    "Algorithm",
    "CommError",
    "CommTimeoutError",
    "DistributedOptimizer",
    "DriftError",
    "GradScaler",
    "Group",
    "InvalidArgumentError",
    "Mesh",
    "MismatchError",
    "NonFiniteError",
    "NonFiniteGradient",
    "NotInitializedError",
    "P2POp",
    "PeerLostError",
    "ReduceOp",
    "ShardedOptimizer",
    "StageError",
    "Work",
    "all_gather",
    "all_gather_grouped",
    "all_gather_into",
    "all_gather_list",
    "all_gather_object",
    "all_reduce",
    "all_reduce_",
    "all_reduce_grouped",
    "all_reduce_grouped_",
    "all_to_all",
    "all_to_all_into",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_",
    "broadcast_grouped_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "checkpoint",
    "clip_grad_norm_",
    "compression",
    "elastic",
    "gather",
    "gather_list",
    "gather_object",
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
    "pipeline",
    "rank",
    "recv",
    "recv_object",
    "reduce",
    "reduce_",
    "reduce_scatter",
    "reduce_scatter_grouped",
    "reduce_scatter_into",
    "scatter",
    "scatter_into",
    "scatter_object",
    "send",
    "send_object",
    "shutdown",
    "size",
    "tensor_parallel",
    "verify_replicas",
]


def __getattr__(name: str) -> Any:
    """These two, when they are first asked for: torch's part of them takes half a second."""
    if name in ("checkpoint", "elastic"):
        return importlib.import_module(f"pycomm.{name}")
    raise AttributeError(f"module 'pycomm' has no attribute {name!r}")
