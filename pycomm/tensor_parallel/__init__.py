"""Tensor parallelism: single layers split over the ranks of a group."""

from pycomm.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from pycomm.tensor_parallel.embedding import VocabParallelEmbedding
from pycomm.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from pycomm.tensor_parallel.regions import (
    copy_to_region,
    gather_from_region,
    gather_from_sequence,
    reduce_from_region,
    reduce_scatter_to_sequence,
    scatter_to_region,
)
from pycomm.tensor_parallel.sequence import SequenceLayerNorm, SequenceRMSNorm, SplitDropout
from pycomm.tensor_parallel.whole import load_whole_state_dict, whole_state_dict

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "SequenceLayerNorm",
    "SequenceRMSNorm",
    "SplitDropout",
    "VocabParallelEmbedding",
    "copy_to_region",
    "gather_from_region",
    "gather_from_sequence",
    "load_whole_state_dict",
    "reduce_from_region",
    "reduce_scatter_to_sequence",
    "scatter_to_region",
    "vocab_parallel_cross_entropy",
    "whole_state_dict",
]
