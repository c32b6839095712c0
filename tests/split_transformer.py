"""A transformer of ordinary layers, and the same one split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycomm import _core
from pycomm.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceLayerNorm,
    SplitDropout,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

VOCABULARY, WIDTH, HEADS, LENGTH, ROWS = 13, 12, 4, 8, 6
SEQUENCE = 1  # the dimension of (row, position, feature)


class Attention(nn.Module):
    """Causal, over the heads that the projections give it."""

    def __init__(self, project: nn.Module, output: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.project, self.output, self.drop = project, output, drop

    def forward(self, x: Tensor) -> Tensor:
        of_heads = self.project(x).unflatten(-1, (-1, 3, WIDTH // HEADS))
        q, k, v = of_heads.permute(3, 0, 2, 1, 4)  # each (row, head, position, feature)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(
            torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1), float("-inf")
        )
        mixed = self.drop(scores.softmax(-1)) @ v
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norms: list[nn.Module], drop: nn.Module
    ):
        super().__init__()
        self.attention, self.mlp, self.drop = attention, mlp, drop
        self.norm_1, self.norm_2 = norms

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm_1(x)))
        return x + self.drop(self.mlp(self.norm_2(x)))


def whole(layers: int = 2, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Ordinary layers, float64."""

    def block() -> Block:
        attention = Attention(
            nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)
        )
        mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))
        norms: list[nn.Module] = [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)]
        return Block(attention, mlp, norms, nn.Dropout(dropout))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        blocks = [block() for _ in range(layers)]
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.LayerNorm(WIDTH), head)
        for param in model.parameters():  # biases and norms that show when they are wrong
            nn.init.normal_(param, std=0.4)
        return model.double()


def split(model: nn.Sequential, group: _core.Group, *, sequence: bool = False) -> nn.Sequential:
    """The same model with every layer's share of this rank."""
    dim = SEQUENCE if sequence else None
    options = {"group": group, "sequence_dim": dim}

    def norm(of: nn.Module) -> nn.Module:
        if not sequence:
            return of
        made = SequenceLayerNorm(WIDTH, group=group, dtype=torch.float64)
        made.load_state_dict(of.state_dict())
        return made

    def residual_drop(p: float) -> nn.Module:
        return SplitDropout(p, dim=SEQUENCE, group=group) if sequence else nn.Dropout(p)

    def block(of: Block) -> Block:
        attention = Attention(
            ColumnParallelLinear.from_module(of.attention.project, **options),
            RowParallelLinear.from_module(of.attention.output, **options),
            SplitDropout(of.attention.drop.p, dim=1, group=group),
        )
        mlp = nn.Sequential(
            ColumnParallelLinear.from_module(of.mlp[0], **options),
            of.mlp[1],
            RowParallelLinear.from_module(of.mlp[2], **options),
        )
        norms = [norm(of.norm_1), norm(of.norm_2)]
        return Block(attention, mlp, norms, residual_drop(of.drop.p))

    embedding, *blocks, last_norm, head = model
    return nn.Sequential(
        VocabParallelEmbedding.from_module(embedding, **options),
        *map(block, blocks),
        norm(last_norm),
        ColumnParallelLinear.from_module(head, **options),
    )


def batch(number: int, rank: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    x = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    return x, torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)


def whole_loss(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def split_loss(logits: Tensor, target: Tensor, group: _core.Group) -> Tensor:
    return vocab_parallel_cross_entropy(logits, target, vocabulary=VOCABULARY, group=group)
