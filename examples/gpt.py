"""A small GPT over bytes, as layers end to end: whole ones, or each split over ranks."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pycomm
from pycomm import tensor_parallel


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int = 4
    heads: int = 4
    width: int = 64
    context: int = 64  # bytes
    vocabulary: int = 256


class Layers:
    """Makes layers: ordinary ones, or a rank's shares of them."""

    def __init__(self, group: pycomm.Group | None) -> None:
        self._group = group

    def outputs_split(self, inputs: int, outputs: int, **options: Any) -> nn.Module:
        if self._group is None:
            return nn.Linear(inputs, outputs, **options)
        return tensor_parallel.ColumnParallelLinear(inputs, outputs, group=self._group, **options)

    def inputs_split(self, inputs: int, outputs: int) -> nn.Module:
        if self._group is None:
            return nn.Linear(inputs, outputs)
        return tensor_parallel.RowParallelLinear(inputs, outputs, group=self._group)

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        if self._group is None:
            return nn.Embedding(vocabulary, width)
        return tensor_parallel.VocabParallelEmbedding(vocabulary, width, group=self._group)


class Embedding(nn.Module):
    def __init__(self, shape: Shape, layers: Layers) -> None:
        super().__init__()
        self.of_bytes = layers.embedding(shape.vocabulary, shape.width)
        self.of_positions = nn.Embedding(shape.context, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.of_bytes(tokens) + self.of_positions(positions)
        return embedded


class Attention(nn.Module):
    """Causal self-attention over as many heads as the projection gives this rank."""

    def __init__(self, shape: Shape, layers: Layers) -> None:
        super().__init__()
        self.features = shape.width // shape.heads
        self.project = layers.outputs_split(shape.width, 3 * shape.width)
        self.merge = layers.inputs_split(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        # A run of outputs is a head's query, key and value, so a rank's share is whole heads.
        of_heads = self.project(x).unflatten(-1, (-1, 3, self.features))
        query, key, value = of_heads.permute(3, 0, 2, 1, 4)  # (row, head, position, feature)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged: Tensor = self.merge(mixed.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    def __init__(self, shape: Shape, layers: Layers) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape, layers)
        self.mlp = nn.Sequential(
            layers.outputs_split(shape.width, 4 * shape.width),
            nn.GELU(),
            layers.inputs_split(4 * shape.width, shape.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        mixed: Tensor = x + self.mlp(self.norm_2(x))
        return mixed


def build(shape: Shape, group: pycomm.Group | None) -> nn.Sequential:
    """The same weights in every call, whatever the group; logits of each position's next byte.

    Args:
        group: each rank keeps its share of the layers, and returns its share of the logits.
    """
    torch.manual_seed(0)
    layers = Layers(group)
    return nn.Sequential(
        Embedding(shape, layers),
        *(Block(shape, layers) for _ in range(shape.layers)),
        nn.LayerNorm(shape.width),
        layers.outputs_split(shape.width, shape.vocabulary, bias=False),
    )


def loss(logits: Tensor, target: Tensor, group: pycomm.Group | None) -> Tensor:
    """The mean cross entropy, of whole logits or of a rank's share."""
    if group is None:
        return functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    return tensor_parallel.vocab_parallel_cross_entropy(logits, target, group=group)
