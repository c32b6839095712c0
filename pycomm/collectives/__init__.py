"""Collective operations on tensors. Each module holds a collective and its transpose."""

from pycomm.collectives.all_reduce import all_reduce, all_reduce_
from pycomm.collectives.all_to_all import all_to_all, all_to_all_into
from pycomm.collectives.barrier import barrier
from pycomm.collectives.broadcast_reduce import broadcast, broadcast_, reduce, reduce_
from pycomm.collectives.gather_scatter import gather, scatter, scatter_into
from pycomm.collectives.grouped_moves import all_gather_grouped, broadcast_grouped_
from pycomm.collectives.grouped_reductions import (
    all_reduce_grouped,
    all_reduce_grouped_,
    reduce_scatter_grouped,
)
from pycomm.collectives.lists import all_gather_list, gather_list
from pycomm.collectives.shards import (
    all_gather,
    all_gather_into,
    reduce_scatter,
    reduce_scatter_into,
)

__all__ = [
    "all_gather",
    "all_gather_grouped",
    "all_gather_into",
    "all_gather_list",
    "all_reduce",
    "all_reduce_",
    "all_reduce_grouped",
    "all_reduce_grouped_",
    "all_to_all",
    "all_to_all_into",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_grouped_",
    "gather",
    "gather_list",
    "reduce",
    "reduce_",
    "reduce_scatter",
    "reduce_scatter_grouped",
    "reduce_scatter_into",
    "scatter",
    "scatter_into",
]
