"""Segment generated volumes with MONAI's 3-D U-Net.

torchrun --nproc-per-node 2 examples/train_monai.py
mpirun -np 2 python examples/train_monai.py
"""

import argparse

import torch
import torch.distributed as dist
from command_line import at_least
from monai.losses import DiceLoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch_ranks import conclude, mean_over_ranks, new_parser, parse_on_ranks

VOXELS = 32  # along each side
HELD_OUT = 16
DICE = 0.8


class Ellipsoids(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Noisy volumes of bright ellipsoids, shape ``(1, 32, 32, 32)``, and where the ellipsoids are.

    Each is a function of its number alone, and is made when it is asked for.
    """

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(self.numbers[index])
        axis = torch.arange(VOXELS)
        place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
        inside = torch.zeros(1, VOXELS, VOXELS, VOXELS, dtype=torch.bool)
        for _ in range(3):
            centre, radius = torch.rand(2, 3, 1, 1, 1, generator=random)
            distance = (place - VOXELS * centre) / (4 + 5 * radius)
            inside |= (distance**2).sum(0) < 1
        noise = torch.randn(inside.shape, generator=random)
        return inside + 0.5 * noise, inside.float()


def arguments() -> argparse.Namespace:
    parser = new_parser("Segment generated volumes on several ranks.", epochs=6)
    parser.add_argument("--volumes", type=at_least(2), default=48, help="to train with")
    parser.add_argument("--workers", type=at_least(0), default=1, help="of each rank, to load data")
    return parse_on_ranks(parser)


def loader(numbers: range, batch: int, workers: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """This rank's share."""
    data = Ellipsoids(numbers)
    sampler: DistributedSampler[tuple[torch.Tensor, torch.Tensor]] = DistributedSampler(data)
    return DataLoader(data, batch, sampler=sampler, num_workers=workers)


@torch.no_grad()
def dice(model: torch.nn.Module, volumes: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    """Mean over the volumes of all ranks; each has as many."""
    model.eval()
    metric = DiceMetric()
    for volume, inside in volumes:
        metric(model(volume) > 0, inside)
    return mean_over_ranks(float(metric.aggregate()))


def main() -> None:
    args = arguments()
    dist.init_process_group(args.backend)
    torch.manual_seed(0)
    model: torch.nn.Module = DistributedDataParallel(
        UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = DiceLoss(sigmoid=True, batch=True)
    train = loader(range(args.volumes), 2, args.workers)
    held_out = loader(range(args.volumes, args.volumes + HELD_OUT), 2, args.workers)

    for epoch in range(args.epochs):
        model.train()
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        total = 0.0
        for volume, inside in train:
            optimizer.zero_grad()
            loss = criterion(model(volume), inside)
            loss.backward()
            optimizer.step()
            total += loss.item() / len(train)
        loss = mean_over_ranks(total)
        score = dice(model, held_out)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.6f}  Dice {score:.4f}", flush=True)
    # Buffers too: DistributedDataParallel sends rank 0's before each forward pass.
    conclude(
        f"loss {loss!r}, Dice {score:.4f} on {HELD_OUT} held-out volumes",
        score > DICE,
        model.state_dict().values(),
    )


if __name__ == "__main__":
    main()
