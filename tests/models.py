"""Small models, one for each way in which gradients come about, and batches to train them on."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def images(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    return x, torch.randint(CLASSES, (4,), generator=generator)


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Sequences whose every token is to be found from the one after it."""
    x = torch.randint(CLASSES, (3, 6), generator=torch.Generator().manual_seed(seed))
    return x, x.roll(1, dims=1)


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def channels_last() -> nn.Module:
    return convolution().to(memory_format=torch.channels_last)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.output = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.block(self.embedding(x)))


class Tied(nn.Module):
    """Embedding and output share one weight, whose gradient has two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 8)
        self.hidden = nn.Linear(8, 8)
        self.output = nn.Linear(8, CLASSES, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(self.embedding(x)).tanh())


class Branches(nn.Module):
    """The data decides whether a branch is used; another never is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 8)
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.output = nn.Linear(8, CLASSES)

    @staticmethod
    def gate(x: Tensor) -> bool:
        return x[0, 0, 0, 0].item() > 0.25

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x.flatten(1)).relu()
        if self.gate(x):
            hidden = hidden + self.sometimes(hidden).tanh()
        return self.output(hidden)


class SeveralDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 8, dtype=torch.float64),
            nn.Linear(8, 8, dtype=torch.bfloat16),
            nn.Linear(8, 8, dtype=torch.float16),
            nn.Linear(8, CLASSES, dtype=torch.float32),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x.tanh().to(layer.weight.dtype))
        return x


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and what it learns. All classify, so that they share a loss."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The same weights in every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(dtype=dtype)

    def batch_of(self, number: int, rank: int) -> tuple[Tensor, Tensor]:
        return self.batch(100 * number + rank)

    def loss(self, model: nn.Module, number: int, rank: int) -> Tensor:
        return self.loss_on(model, *self.batch_of(number, rank))

    @staticmethod
    def loss_on(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean over all that is classified."""
        if x.is_floating_point():
            x = x.to(next(model.parameters()).dtype)
        return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


PROBLEMS = {
    "tied": Problem(Tied, tokens),
    "branches": Problem(Branches, images),
    "convolution": Problem(convolution, images),
    "channels_last": Problem(channels_last, images),
    "transformer": Problem(Transformer, tokens),
    "several_dtypes": Problem(SeveralDtypes, images),
}
