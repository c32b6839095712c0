"""Tell generated shapes apart with Hugging Face Accelerate.

torchrun --nproc-per-node 2 examples/train_accelerate.py
mpirun -np 2 python examples/train_accelerate.py
"""

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from command_line import at_least
from shapes import classifier, single_shapes
from torch import nn
from torch.utils.data import DataLoader
from torch_ranks import conclude, mean_over_ranks, new_parser, parse_on_ranks

ACCURACY = 0.95


def arguments() -> argparse.Namespace:
    parser = new_parser("Tell shapes apart with Accelerate.", epochs=10)
    parser.add_argument("--workers", type=at_least(0), default=1, help="of each rank, to load data")
    return parse_on_ranks(parser)


@torch.no_grad()
def accuracy(
    accelerator: Accelerator, model: nn.Module, held_out: DataLoader[tuple[torch.Tensor, ...]]
) -> float:
    model.eval()
    hits = [
        accelerator.gather_for_metrics(model(pictures).argmax(1) == kinds)
        for pictures, kinds in held_out
    ]
    return float(torch.cat(hits).float().mean())


def main() -> None:
    args = arguments()
    # On CPUs Accelerate itself knows gloo alone, but uses a process group that is there already.
    if args.backend != "gloo":
        dist.init_process_group(args.backend)
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    model = classifier()
    model, optimizer, train, held_out = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        DataLoader(single_shapes(range(512)), 16, shuffle=True, num_workers=args.workers),
        DataLoader(single_shapes(range(512, 640)), 16, num_workers=args.workers),
    )
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for pictures, kinds in train:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(pictures), kinds)
            accelerator.backward(loss)
            optimizer.step()
            total += loss.item() / len(train)
        mean_loss = mean_over_ranks(total)
        score = accuracy(accelerator, model, held_out)
        accelerator.print(f"epoch {epoch + 1}/{args.epochs}  loss {mean_loss:.6f}  {score:.4f}")
    conclude(
        f"loss {mean_loss!r}, accuracy {score:.4f}",
        score > ACCURACY,
        model.state_dict().values(),
    )


if __name__ == "__main__":
    main()
