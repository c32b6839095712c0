"""Train a small GPT whose layers, and replicas of them, are spread over ranks.

mpirun -np 4 python examples/train_gpt.py --dp 2 --pp 2
"""

import functools

import gpt
import gpt_verify
import torch
from dashboard import Dashboard
from gpt_arguments import parse_arguments, parser
from run_folder import open_run
from text import Text
from torch import Tensor

import pycomm
from pycomm.pipeline import Pipeline
from pycomm.pipeline.schedule import simulate
from pycomm.tensor_parallel import gather_from_region

PROMPT = b"def "
SAMPLE_BYTES = 60
LEARNING_RATE = 3e-3
TEST_PASSAGES = 64
AVG = pycomm.ReduceOp.AVG


def build_optimizer(
    pipeline: Pipeline, replicas: pycomm.Group, *, in_shares: bool
) -> pycomm.DistributedOptimizer | pycomm.ShardedOptimizer:
    named = pipeline.named_parameters()
    if in_shares:
        return pycomm.ShardedOptimizer(torch.optim.AdamW, named, group=replicas, lr=LEARNING_RATE)
    bare = torch.optim.AdamW(pipeline.parameters(), lr=LEARNING_RATE)
    return pycomm.DistributedOptimizer(bare, named, group=replicas)


def generate(pipeline: Pipeline, shape: gpt.Shape, mesh: pycomm.Mesh, rows: int) -> list[str]:
    """As many continuations of the prompt; on every rank. The model forgets what is too long."""
    passages = torch.tensor([list(PROMPT)] * rows)
    generator = torch.Generator().manual_seed(0)  # the same on ranks that split the last layer
    last = mesh.shape["pp"] - 1
    for _ in range(SAMPLE_BYTES):
        logits = pipeline.evaluate(passages[:, -shape.context :])
        following = torch.zeros((rows, 1), dtype=torch.int64)
        if logits is not None:  # on the ranks of the last stage
            whole = gather_from_region(logits[:, -1].contiguous(), group=mesh["tp"])
            following = torch.multinomial(whole.softmax(-1), 1, generator=generator)
        following = pycomm.broadcast(following, last, group=mesh["pp"])
        passages = torch.cat([passages, following], 1)
    return [bytes(row).decode(errors="replace") for row in passages.tolist()]


def main() -> None:
    pycomm.init()
    torch.set_num_threads(1)  # every rank has a core; more threads would fight for them
    args = parse_arguments()
    if args.verify:
        torch.set_default_dtype(torch.float64)
    mesh = pycomm.Mesh({"dp": args.dp, "pp": args.pp, "tp": args.tp})
    replica, rows = mesh.coordinate["dp"], args.batch // args.dp
    splitting = mesh["tp"] if args.tp > 1 else None  # ordinary layers round as one process does
    shape = gpt.Shape(layers=args.layers)
    text = Text(shape.context)

    def mine(t: Tensor) -> Tensor:
        """Of all passages those of this replica."""
        return t[replica * rows : (replica + 1) * rows]

    pipeline = Pipeline(
        gpt.build(shape, splitting),
        functools.partial(gpt.loss, group=splitting),
        schedule=args.schedule,
        micro_batches=args.micro_batches,
        group=mesh["pp"],
    )
    optimizer = build_optimizer(pipeline, mesh["dp"], in_shares=args.zero)
    run = open_run(args, parser)
    state = {"model": pipeline, "optimizer": optimizer}
    run.resume(state, "step", args.steps)
    done = int(run.history[-1]["step"]) if run.history else 0

    with Dashboard(args.steps, "bytes", ("pipe", "grad")) as dashboard:
        while done < args.steps:
            until = min(done + args.every, args.steps)
            dashboard.begin(f"to step {until}", done)
            losses = []
            for step in range(done, until):
                x, y = map(mine, text.batch(step, args.batch))
                waited = optimizer.wait_seconds
                optimizer.zero_grad()
                losses.append(pipeline.step(x, y))
                optimizer.step()
                dashboard.step(
                    losses[-1].item(),
                    args.batch * shape.context,
                    {
                        "pipe": pipeline.statistics.wait_seconds,
                        "grad": optimizer.wait_seconds - waited,
                    },
                )
            done = until
            speed = dashboard.end()
            training = pycomm.all_reduce(torch.stack(losses).mean(), AVG, group=mesh["dp"])
            pipeline.eval()
            test_rows = max(TEST_PASSAGES, args.micro_batches)
            tested = pipeline.evaluate(*text.batch(0, test_rows, test=True))
            dashboard.print(generate(pipeline, shape, mesh, args.micro_batches)[0])
            pipeline.train()
            row = {"step": done, "training_loss": float(training), "test_loss": float(tested)}
            run.record(row | speed | {"bubble": simulate(pipeline.schedule).bubble}, state)
    run.report(
        f"test loss {run.history[-1]['test_loss']:.3f} after {args.steps} steps",
        "step",
        [["training_loss", "test_loss"], ["pipe_wait_share", "grad_wait_share", "bubble"]],
    )
    if args.verify:
        difference = gpt_verify.largest_difference(pipeline, shape, text, mesh, args, LEARNING_RATE)
        if pycomm.rank() == 0:
            print(f"largest parameter difference: {difference:g}")


if __name__ == "__main__":
    main()
