"""Mixed operations for an hour, and whether anything grows: ``make soak MINUTES=60``.

Four ranks under mpirun, on two pretended hosts, so that MPI carries messages too, go round after
round: a random program of collectives, messages, threads and groups that are made and dropped, all
compared with NumPy (tests/fuzz); optimizer steps, of a new model now and then; a checkpoint saved
and loaded; and every so often ``shutdown()`` and ``init()`` in the same process.

Each rank notes its memory, descriptors and threads at the same point of every round. The verdict
looks at the second half of the rounds, when caches, pools and the memory allocator have seen
everything:

- descriptors, threads: no round of the last quarter has more than the highest of the third one.
- memory: the line through the medians of ten parts of the second half (Theil-Sen: the median of all
  slopes between them) rises by less than the allowance:
  - heap, the bytes that malloc has given out: 0.1 %, and 16 KiB for each init(), since MPI keeps
    the communicator that pycomm duplicated (see MpiChannel).
  - other, private memory that is not malloc's: 2 % of the private memory. How much of what malloc
    has reserved was touched never is known, and it goes up and down in steps of 3 MiB.
  - resident, and private memory as a whole: 10 %. It holds what malloc keeps free, and programs of
    random sizes leave holes: the same round of the same seed needs 9 MiB more, in any run.
- shm, mapped from /dev/shm: as memory, with 1 MiB. pycomm puts nothing there, Open MPI does.

Needs glibc 2.33 (mallinfo2).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_END = 120.0  # for the last round
STEPS_OF_PROGRAM = 25
STEPS_OF_TRAINING = 5
ROUNDS_OF_MODEL = 6
ROUNDS_OF_SESSION = 10
COUNTED = ("descriptors", "threads")
PART_ALLOWED = {"heap": 0.001, "other": 0.02, "private": 0.1, "resident": 0.1}
MEMORY = (*(f"{name}_bytes" for name in PART_ALLOWED), "shm_bytes")
BYTES_OF_INIT = 16384
SHM = " /dev/shm/"


@dataclass(frozen=True)
class Sample:
    seconds: float
    resident_bytes: int  # with the shared memory that this rank has touched, its peers' too
    private_bytes: int
    heap_bytes: int  # that malloc has given out
    other_bytes: int  # private, and not malloc's
    descriptors: int
    threads: int
    shm_bytes: int  # mapped from /dev/shm
    inits: int
    operations: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1, help="of the first program")
    parser.add_argument("--mpirun", default="mpirun", help="the launcher, with its options")
    parser.add_argument("--keep", type=Path, help="folder for every rank's samples, as JSON lines")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank is not None:
        run_rank(arguments, arguments.as_rank)
        return 0
    launcher, *options = shlex.split(arguments.mpirun)
    found = shutil.which(launcher)
    if found is None:
        parser.error(f"--mpirun: there is no program {launcher!r}")
    with tempfile.TemporaryDirectory(prefix="pycomm-soak-") as made:
        # Whole, for the ranks start in another folder.
        command = [
            str(Path(found).absolute()), *options, "-np", str(arguments.ranks),
            sys.executable, __file__,
            "--minutes", str(arguments.minutes), "--ranks", str(arguments.ranks),
            "--seed", str(arguments.seed), "--as-rank", made,
        ]  # fmt: skip
        limit_s = arguments.minutes * 60 + 5 * SECONDS_TO_END
        code = subprocess.run(command, cwd=ROOT / "tests", timeout=limit_s).returncode
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            for file in Path(made).glob("*.jsonl"):
                shutil.copy(file, arguments.keep)
        samples = [read(Path(made) / f"{rank}.jsonl") for rank in range(arguments.ranks)]
    if code != 0:
        print(f"FAILED: a rank ended with {code}; its output is above.")
        return 1
    return verdict(samples)


def read(file: Path) -> list[Sample]:
    if not file.exists():
        return []
    return [Sample(**json.loads(line)) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------- a rank


def run_rank(arguments: argparse.Namespace, folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import pycomm
    from pycomm.launch import detect
    from pycomm.runtime import world_group

    launch = detect(os.environ)
    os.environ["PYCOMM_HOST"] = "ab"[2 * launch.rank // arguments.ranks]
    began = time.monotonic()
    operations = 0
    training: Training | None = None
    inits = 0
    with open(folder / f"{launch.rank}.jsonl", "w") as out:
        for number in itertools.count():
            if not pycomm.is_initialized():
                pycomm.init(timeout_s=300)
                inits += 1
            operations += run_program(arguments.seed + number, world_group())
            if training is None:
                training = Training(number)
            training.step(folder / "checkpoint" if number % 3 == 0 else None)
            if number % ROUNDS_OF_MODEL == ROUNDS_OF_MODEL - 1:
                training = None
            is_last = pycomm.broadcast_object(time.monotonic() - began > arguments.minutes * 60)
            if is_last or number % ROUNDS_OF_SESSION == ROUNDS_OF_SESSION - 1:
                training = None
                gc.collect()
                pycomm.shutdown()
            gc.collect()
            sample = take_sample(began, inits, operations)
            out.write(json.dumps(asdict(sample)) + "\n")
            out.flush()
            if launch.rank == 0 and number % 20 == 0:
                print(
                    f"  {sample.seconds / 60:.1f} min, round {number}: {shown(sample)}", flush=True
                )
            if is_last:
                return


def run_program(seed: int, group: object) -> int:
    from fuzz.execute import execute
    from fuzz.program import generate

    hosts = [0] * group.size
    for host, ranks in enumerate(group.hosts):
        for rank in ranks:
            hosts[rank] = host
    program = generate(seed, STEPS_OF_PROGRAM, tuple(hosts))
    execute(program, group)
    return program.operations


class Training:
    """A model of its own, under one of the two optimizers."""

    def __init__(self, number: int) -> None:
        import torch

        import pycomm

        torch.manual_seed(number)
        self._model = torch.nn.Sequential(
            torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)
        )
        pycomm.broadcast_parameters(self._model)
        named = list(self._model.named_parameters())
        if number // ROUNDS_OF_MODEL % 2:
            self._optimizer = pycomm.ShardedOptimizer(torch.optim.AdamW, named, lr=1e-3)
        else:
            adam = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
            self._optimizer = pycomm.DistributedOptimizer(adam, named)

    def step(self, checkpoint: Path | None) -> None:
        import torch

        import pycomm

        for _ in range(STEPS_OF_TRAINING):
            self._optimizer.zero_grad()
            self._model(torch.randn(32, 64)).square().mean().backward()
            self._optimizer.step()
        if checkpoint is not None:
            state = {"model": self._model, "optimizer": self._optimizer}
            pycomm.checkpoint.save(checkpoint, state)
            pycomm.checkpoint.load(checkpoint, state)


class Mallinfo2(ctypes.Structure):
    """What glibc's allocator says of all its heaps; its manual has the names."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def take_sample(began: float, inits: int, operations: int) -> Sample:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())

    def kilobytes(name: str) -> int:
        return int(status[name].split()[0]) * 1024

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    malloc = libc.mallinfo2()
    of_shm = [line for line in Path("/proc/self/maps").read_text().splitlines() if SHM in line]
    ends = [line.split()[0].split("-") for line in of_shm]
    return Sample(
        seconds=time.monotonic() - began,
        resident_bytes=kilobytes("VmRSS"),
        private_bytes=kilobytes("RssAnon"),
        heap_bytes=malloc.uordblks + malloc.hblkhd,
        other_bytes=kilobytes("RssAnon") - malloc.arena - malloc.hblkhd,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        shm_bytes=sum(int(end, 16) - int(begin, 16) for begin, end in ends),
        inits=inits,
        operations=operations,
    )


# ------------------------------------------------------------------------------- the verdict


def verdict(samples: list[list[Sample]]) -> int:
    rounds = min(map(len, samples))
    if rounds < 30:
        print(f"FAILED: {rounds} rounds are too few to judge. Run it for longer.")
        return 1
    last = samples[0][rounds - 1]
    print(
        f"{len(samples)} ranks, {last.seconds / 60:.1f} minutes, {rounds} rounds, "
        f"{last.operations} operations on each rank, {last.inits} times init()"
    )
    problems = []
    for rank, of_rank in enumerate(samples):
        half = of_rank[rounds // 2 : rounds]
        texts = []
        for name in COUNTED:
            values = [getattr(sample, name) for sample in half]
            before, after = max(values[: len(values) // 2]), max(values[len(values) // 2 :])
            texts.append(f"{name} {before} then {after}")
            if after > before:
                problems.append(f"rank {rank}: {name} grew from {before} to {after}")
        for name in MEMORY:
            growth, slope = growth_of([(s.seconds, getattr(s, name)) for s in half])
            allowed = allowance(name, half)
            texts.append(
                f"{name.removesuffix('_bytes')} {half[0].__dict__[name] / 2**20:.1f} MiB "
                f"{growth / 2**20:+.2f} ({slope * 3600 / 2**20:+.1f} an hour, "
                f"allowed {allowed / 2**20:.2f})"
            )
            if growth > allowed:
                problems.append(
                    f"rank {rank}: {name} grew by {growth / 2**20:.2f} MiB in "
                    f"{(half[-1].seconds - half[0].seconds) / 60:.1f} minutes, "
                    f"{allowed / 2**20:.2f} are allowed"
                )
        print(f"  rank {rank}: " + "; ".join(texts))
    print("LEAKING: " + "; ".join(problems) if problems else "flat: nothing grows")
    return 1 if problems else 0


def growth_of(points: list[tuple[float, int]]) -> tuple[float, float]:
    """Over all points, and a second: Theil-Sen through the medians of ten parts."""
    parts = [points[len(points) * i // 10 : len(points) * (i + 1) // 10] for i in range(10)]
    medians = [
        (statistics.median(t for t, _ in part), statistics.median(value for _, value in part))
        for part in parts
    ]
    slope = statistics.median(
        (later - earlier) / (then - now)
        for (now, earlier), (then, later) in itertools.combinations(medians, 2)
    )
    return slope * (points[-1][0] - points[0][0]), slope


def allowance(name: str, half: list[Sample]) -> float:
    if name == "shm_bytes":
        return 2**20
    of = half[0].private_bytes if name == "other_bytes" else getattr(half[0], name)
    inits = 0 if name == "other_bytes" else half[-1].inits - half[0].inits
    return PART_ALLOWED[name.removesuffix("_bytes")] * of + BYTES_OF_INIT * inits


def shown(sample: Sample) -> str:
    return (
        f"{sample.resident_bytes / 2**20:.1f} MiB, {sample.private_bytes / 2**20:.1f} private, "
        f"{sample.heap_bytes / 2**20:.2f} in use, "
        f"{sample.descriptors} descriptors, {sample.threads} threads, {sample.inits} times init()"
    )


if __name__ == "__main__":
    sys.exit(main())
