"""Pictures of discs, squares and crosses, and a network that tells them apart.

Each picture is a function of its number alone.
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

KINDS = ("disc", "square", "cross")


def picture(number: int, pixels: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy grey picture with ``count`` shapes.

    Returns:
        The picture, shape ``(pixels, pixels)``, from 0 to 1, and a row for each shape, shape
        ``(count, 5)``: its kind's index in KINDS; x and y of its centre, width and height of its
        box, all in pictures.
    """
    random = torch.Generator().manual_seed(number)
    image = 0.1 * torch.rand(pixels, pixels, generator=random)
    x = (torch.arange(pixels) + 0.5) / pixels
    y = x[:, None]
    rows = []
    for _ in range(count):
        kind = int(torch.randint(len(KINDS), (), generator=random))
        radius = 0.15 + 0.1 * float(torch.rand((), generator=random))
        dx, dy = (radius + (1 - 2 * radius) * torch.rand(2, generator=random)).tolist()
        u, v = (x - dx).abs() / radius, (y - dy).abs() / radius
        inside = {
            "disc": u**2 + v**2 < 1,
            "square": (u < 1) & (v < 1),
            "cross": (u < 1) & (v < 1) & ((u < 0.3) | (v < 0.3)),
        }[KINDS[kind]]
        image[inside] += 0.5 + 0.3 * float(torch.rand((), generator=random))
        rows.append([kind, dx, dy, 2 * radius, 2 * radius])
    return image.clamp(0, 1), torch.tensor(rows)


def single_shapes(numbers: range, pixels: int = 16) -> TensorDataset:
    """Pictures of one shape each, and which it is."""
    pictures, rows = zip(*(picture(number, pixels, 1) for number in numbers), strict=True)
    return TensorDataset(torch.stack(pictures)[:, None], torch.cat(rows)[:, 0].long())


def classifier() -> nn.Module:
    """For pictures of 16 x 16; with BatchNorm, whose buffers ranks have to keep alike."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, len(KINDS))),
    )
