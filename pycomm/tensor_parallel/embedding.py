"""An embedding table whose rows are split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycomm._core import Group
from pycomm.arguments import refuse
from pycomm.runtime import group_of
from pycomm.shares import SplitModule, bounds, refuse_fewer
from pycomm.tensor_parallel.agreement import check_same
from pycomm.tensor_parallel.regions import reduce_from_region, reduce_scatter_to_sequence


class VocabParallelEmbedding(SplitModule):
    """``nn.Embedding`` of which each rank has a share of the vocabulary.

    A rank looks up the tokens that it has and takes zero for the others; the sum over the ranks is
    the embedding.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: of the whole table, as for
            ``nn.Embedding``. The ranks' shares differ by at most one row.
        sequence_dim: return the output split along this dimension of it instead of whole.
        group: the ranks that share the table, the world if None.

    Weights are those of ``nn.Embedding`` drawn from the same random state, of which each rank keeps
    its share. A ``ColumnParallelLinear`` over the vocabulary may have the same ``weight``.

    Input: integers of any shape, the same on every rank. Output: ``(*, embedding_dim)``, whole.

    Raises:
        InvalidArgumentError: fewer rows than ranks; in ``forward``, a token that is not in the
            vocabulary (on CUDA, as in torch, an assertion on the device).
        MismatchError: in ``forward``, ranks were given different tokens (CPU tensors).

    Cost: one all-reduce of the output forward, nothing backward. With ``sequence_dim``
    reduce-scatter forward and all-gather backward.

    Source: Shoeybi et al., Megatron-LM (2019).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        sequence_dim: int | None = None,
        group: Group | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group_of(group, "VocabParallelEmbedding"))
        refuse_fewer("VocabParallelEmbedding", "num_embeddings", num_embeddings, self.group)
        whole = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = whole.padding_idx  # counted from the front
        self.sequence_dim = sequence_dim
        self._begin, self._end = bounds(num_embeddings, self.group.size, self.group.rank)
        self.weight: nn.Parameter
        self.take_share("weight", whole.weight, 0)

    @classmethod
    def from_module(
        cls, embedding: nn.Embedding, *, group: Group | None = None, **options: Any
    ) -> VocabParallelEmbedding:
        """The share of ``embedding``, the same on every rank; ``options`` as for the class.

        Raises:
            InvalidArgumentError: it has ``max_norm``, ``scale_grad_by_freq`` or ``sparse``.
        """
        group = group_of(group, "VocabParallelEmbedding")
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, option):
                refuse(
                    "VocabParallelEmbedding",
                    group,
                    f"the embedding has {option}={getattr(embedding, option)!r}, which a split "
                    "table does not support.\n  Build it without.",
                )
        made = cls(
            *(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx),
            **{"group": group, "device": "meta", "dtype": embedding.weight.dtype, **options},
        )
        made.take_share("weight", embedding.weight, 0)
        return made

    def to_module(self) -> nn.Embedding:
        """The whole table, on every rank. Collective."""
        whole = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        weight = self.whole("weight")
        assert weight is not None
        whole.weight = weight
        return whole

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        check_same("embedding", "tokens", tokens, self.group)
        here = (tokens >= self._begin) & (tokens < self._end)
        known = (tokens >= 0) & (tokens < self.num_embeddings)
        # A token that no rank has stays one that torch refuses.
        rows = torch.where(here, tokens - self._begin, torch.where(known, 0, -1))
        padding = self.padding_idx
        if padding is not None:
            padding = padding - self._begin if self._begin <= padding < self._end else None
        try:
            found = functional.embedding(rows, self.weight, padding)
        except IndexError:
            refuse(
                "VocabParallelEmbedding",
                self.group,
                f"tokens hold {int(tokens[~known][0])}, and the vocabulary is 0 to "
                f"{self.num_embeddings - 1}.",
            )
        partial = found.masked_fill(~here.unsqueeze(-1), 0.0)
        if self.sequence_dim is None:
            return reduce_from_region(partial, group=self.group)
        return reduce_scatter_to_sequence(partial, self.sequence_dim, group=self.group)

    def extra_repr(self) -> str:
        """As ``nn.Embedding``."""
        return f"{self.weight.shape[0]} of {self.num_embeddings}, {self.embedding_dim}"
