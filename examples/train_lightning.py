"""Tell generated shapes apart with Lightning.

python examples/train_lightning.py                           # Lightning starts the other rank
torchrun --nproc-per-node 2 examples/train_lightning.py
mpirun -np 2 python examples/train_lightning.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from command_line import at_least
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from shapes import classifier, single_shapes
from torch import nn
from torch.utils.data import DataLoader
from torch_ranks import conclude, new_parser

ACCURACY = 0.95


class Classifier(LightningModule):  # type: ignore[misc]  # Lightning may not be installed
    def __init__(self) -> None:
        super().__init__()
        self.layers = classifier()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        pictures, kinds = batch
        loss = nn.functional.cross_entropy(self.layers(pictures), kinds)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        pictures, kinds = batch
        correct = self.layers(pictures).argmax(1) == kinds
        self.log("accuracy", correct.float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def arguments() -> argparse.Namespace:
    parser = new_parser("Tell shapes apart with Lightning.", epochs=6)
    parser.add_argument("--ranks", type=at_least(2), default=2, help="as many as a launcher starts")
    parser.add_argument("--workers", type=at_least(0), default=1, help="of each rank, to load data")
    parser.add_argument("--runs", type=Path, default="runs/lightning", metavar="DIR")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    seed_everything(0, verbose=False)
    options: dict[str, Any] = {"num_workers": args.workers, "batch_size": 16}
    trainer = Trainer(
        strategy=DDPStrategy(process_group_backend=args.backend),
        accelerator="cpu",
        devices=args.ranks,
        max_epochs=args.epochs,
        default_root_dir=args.runs,
        logger=CSVLogger(args.runs),
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    model = Classifier()
    trainer.fit(
        model,
        DataLoader(single_shapes(range(512)), shuffle=True, **options),
        DataLoader(single_shapes(range(512, 640)), **options),
    )
    reached = trainer.callback_metrics
    conclude(
        f"loss {float(reached['loss'])!r}, accuracy {float(reached['accuracy']):.4f}",
        float(reached["accuracy"]) > ACCURACY,
        model.parameters(),
    )


if __name__ == "__main__":
    main()
