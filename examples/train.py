"""Train a small convolutional network on handwritten digits.

mpirun -np 4 python examples/train.py
"""

import torch
from arguments import COMPRESSORS, parse_arguments, parser
from dashboard import Dashboard
from run_folder import open_run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from verify import largest_difference

import pycomm


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def build_schedule(optimizer: torch.optim.Optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, gamma=0.85)  # every epoch


def load_data() -> list[TensorDataset]:
    """A training and a test set of 8 x 8 grey images."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = map(torch.tensor, parts)
    shaped = (x.to(torch.get_default_dtype()).view(-1, 1, 8, 8) for x in (x_train, x_test))
    return [TensorDataset(x, y) for x, y in zip(shaped, (y_train, y_test), strict=True)]


def shard(data: TensorDataset, batch: int, rank: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """The batches of one rank; ``batch`` counts the images that all ranks together take a step."""
    sampler: DistributedSampler[TensorDataset] = DistributedSampler(
        data, num_replicas=pycomm.size(), rank=rank
    )
    return DataLoader(data, batch_size=batch // pycomm.size(), sampler=sampler)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = (part[pycomm.rank() :: pycomm.size()] for part in data.tensors)
    correct = (model(images).argmax(1) == labels).sum()
    return int(pycomm.all_reduce(correct)) / len(data)


def main() -> None:
    pycomm.init()
    torch.set_num_threads(1)  # every rank has a core; more threads would fight for them
    args = parse_arguments()
    if args.verify:
        torch.set_default_dtype(torch.float64)
    run = open_run(args, parser)
    train_set, test_set = load_data()
    loader = shard(train_set, args.batch, pycomm.rank())

    model = build_model()
    optimizer = pycomm.DistributedOptimizer(
        build_optimizer(model),
        model.named_parameters(),
        compressor=COMPRESSORS.get(args.compress),
    )
    schedule = build_schedule(optimizer)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    run.resume(state, "epoch", args.epochs)
    pycomm.broadcast_parameters(model)

    with Dashboard(args.epochs * len(loader), "samples", ["grad"]) as dashboard:
        for epoch in range(len(run.history), args.epochs):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            dashboard.begin(f"epoch {epoch + 1:2d}/{args.epochs}", epoch * len(loader))
            total = torch.zeros(())
            for images, labels in loader:
                waited = optimizer.wait_seconds
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach()
                waited = optimizer.wait_seconds - waited
                dashboard.step(loss.item(), args.batch, {"grad": waited})
            schedule.step()
            mean_loss = float(pycomm.all_reduce(total / len(loader), pycomm.ReduceOp.AVG))
            speed = dashboard.end()
            row = {"epoch": epoch + 1, "loss": mean_loss, "accuracy": accuracy(model, test_set)}
            run.record(row | speed, state)
    run.report(
        f"test accuracy {run.history[-1]['accuracy']:.2%} after {args.epochs} epochs",
        "epoch",
        [["loss"], ["accuracy"]],
    )
    if args.verify and pycomm.rank() == 0:
        replica = build_model()
        alone = build_optimizer(replica)
        schedule = build_schedule(alone)
        loaders = [shard(train_set, args.batch, rank) for rank in range(pycomm.size())]
        difference = largest_difference(model, replica, alone, schedule, loaders, args.epochs)
        print(f"largest parameter difference: {difference:g}")


if __name__ == "__main__":
    main()
