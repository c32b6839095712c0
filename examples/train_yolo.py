"""Train Ultralytics' YOLO on generated pictures of shapes, from scratch.

torchrun --nproc-per-node 2 examples/train_yolo.py
mpirun -np 2 python examples/train_yolo.py
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from command_line import at_least
from PIL import Image
from shapes import KINDS, picture
from torch_ranks import conclude, mean_over_ranks, new_parser, parse_on_ranks
from ultralytics import YOLO

import pycomm.ultralytics  # noqa: F401  # the line that makes ranks of a launcher's processes

IMAGES = 16  # to train with; half as many to validate with


def arguments() -> argparse.Namespace:
    parser = new_parser("Train YOLO from scratch on several ranks.", epochs=12)
    parser.add_argument("--nms", action="store_true", help="validate the head that needs it")
    parser.add_argument("--pixels", type=at_least(32), default=64, help="along each side")
    parser.add_argument(
        "--runs", type=Path, default="runs/yolo", metavar="DIR", help="overwritten by each run"
    )
    return parse_on_ranks(parser)


def write_data(folder: Path, pixels: int) -> Path:
    """Write pictures and labels, unless they are there; return their description.

    Every rank may do so at once: who is first gives its folder the name.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        for part, first, count in [("train", 0, IMAGES), ("val", IMAGES, IMAGES // 2)]:
            (draft / "images" / part).mkdir(parents=True)
            (draft / "labels" / part).mkdir(parents=True)
            for number in range(first, first + count):
                image, rows = picture(number, pixels, 2)
                grey = Image.fromarray((255 * image).byte().numpy())
                grey.convert("RGB").save(draft / "images" / part / f"{number}.png")
                lines = [f"{int(row[0])} {' '.join(f'{x:.6f}' for x in row[1:])}" for row in rows]
                (draft / "labels" / part / f"{number}.txt").write_text("\n".join(lines) + "\n")
        names = "".join(f"  {index}: {kind}\n" for index, kind in enumerate(KINDS))
        description = f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}"
        (draft / "data.yaml").write_text(description)
        try:
            draft.rename(folder)
        except OSError:
            shutil.rmtree(draft)
            if not folder.exists():
                raise
    return folder / "data.yaml"


def main() -> None:
    args = arguments()
    runs = args.runs.resolve()
    if args.backend != "pycomm":
        dist.init_process_group(args.backend)
    losses: list[float] = []

    def remember_loss(trainer: Any) -> None:
        losses.append(sum(float(loss) for loss in trainer.tloss.values()))

    model = YOLO("yolo26n.yaml")
    model.add_callback("on_train_epoch_end", remember_loss)
    model.train(
        data=write_data(runs / f"shapes-{args.pixels}", args.pixels),
        device="cpu",
        epochs=args.epochs,
        batch=8,
        nbs=8,  # an optimizer step for each batch
        imgsz=args.pixels,
        project=str(runs),
        name="train",
        exist_ok=True,  # else rank 0 alone would choose another name
        plots=False,
        nms=None if args.nms else False,
    )
    first, last = mean_over_ranks(losses[0]), mean_over_ranks(losses[-1])
    trained = model.trainer
    # What is saved are the averaged weights. The BatchNorm buffers of those that are trained differ
    # from rank to rank: Ultralytics has DistributedDataParallel leave them alone, on GPUs as well.
    conclude(
        f"loss {last!r} after {first!r}, see {args.runs}/train/",
        last < 0.9 * first,
        [*trained.model.parameters(), *trained.ema.ema.state_dict().values()],
    )


if __name__ == "__main__":
    main()
