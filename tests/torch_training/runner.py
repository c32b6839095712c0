"""Run cases on gloo and on pycomm in the processes of one ``torchrun``, and compare.

    torchrun --nproc-per-node 2 -m torch_training.runner FOLDER [--all] [NAME...]

Each rank writes a line of JSON for each case, its ``Verdict``, into ``FOLDER/rankR.jsonl``. Every
case has process groups of its own, so that one that fails ends no other.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import importlib
import json
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import gloo_versions
import torch
import torch.distributed as dist

from torch_training.cases import CASES, ROUNDING, STEPS, Case, tensors
from torch_training.verdict import Difference, Verdict

TOPICS = ["data_parallel", "sharded", "parallel", "pipelines", "checkpoints", "compiled"]
if not gloo_versions.RUNS_PIPELINES:
    TOPICS.remove("pipelines")
BACKENDS = ("gloo", "pycomm")
TIMEOUT_S = 60.0  # of an operation
CASE_TIMEOUT_S = 180.0

Leaves = list[tuple[str, torch.Tensor]]


def run(case: Case, store: dist.Store, rank: int, size: int) -> Verdict:
    outcomes: dict[str, Leaves] = {}
    refusals: dict[str, str] = {}
    problems: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for backend in BACKENDS:
        began = time.monotonic()
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"{case.name}/{backend}", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        try:
            outcomes[backend] = list(tensors(case.run()))
        except Exception as error:
            if case.refused and case.refused in str(error):
                refusals[backend] = case.refused
            else:
                problems[backend] = traceback.format_exc()
                dist.distributed_c10d._abort_process_group()  # the others' calls end, too
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        seconds[backend] = time.monotonic() - began
    if case.refused and not problems and len(refusals) < len(BACKENDS):
        problems["torch"] = f"refuses this no longer: {case.refused}"
    difference, allowed, compared = None, 0.0, 0
    if len(outcomes) == len(BACKENDS):
        of_gloo, of_pycomm = outcomes.values()
        compared = len(of_gloo)
        difference = difference_of(of_gloo, of_pycomm)
        if case.compared == ROUNDING and size > 2:
            allowed = rounding(of_gloo, size)
    return Verdict(
        case.name,
        case.summary,
        rank,
        size,
        refusals.get("pycomm", ""),
        problems,
        difference,
        allowed,
        compared,
        seconds,
    )


def difference_of(these: Leaves, those: Leaves) -> Difference | None:
    assert [name for name, _ in these] == [name for name, _ in those], "other results altogether"
    assert these, "nothing to compare"
    different = []
    for (name, mine), (_, other) in zip(these, those, strict=True):
        assert mine.shape == other.shape and mine.dtype is other.dtype, name
        assert mine.isfinite().all(), f"{name} is not finite"
        if not torch.equal(mine, other):
            scale = max(1.0, mine.double().abs().max().item())
            apart = (mine.double() - other.double()).abs().max().item() / scale
            different.append(Difference(name, apart))
    if not different:
        return None
    return Difference(different[0].first, max(d.relative for d in different))


def rounding(outcome: Leaves, size: int) -> float:
    """The bound that ``torch_training.cases`` derives; Python's numbers came from float32."""
    units = [torch.finfo(t.dtype).eps / 2 for _, t in outcome if t.is_floating_point()]
    return 4 * STEPS * (size - 1) * max(*units, torch.finfo(torch.float32).eps / 2)


def chosen(options: argparse.Namespace, size: int) -> list[Case]:
    def is_wanted(case: Case) -> bool:
        if options.names:
            return case.name in options.names
        return options.all or size in case.in_ci

    return [case for case in CASES.values() if size in case.world_sizes and is_wanted(case)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="not only the cases of CI")
    parser.add_argument("names", nargs="*")
    options: Any = parser.parse_args()
    for topic in TOPICS:
        importlib.import_module(f"torch_training.{topic}")
    warnings.simplefilter("ignore")
    store, rank, size = next(dist.rendezvous("env://"))
    with open(options.folder / f"rank{rank}.jsonl", "w", buffering=1) as report:
        for case in chosen(options, size):
            faulthandler.dump_traceback_later(CASE_TIMEOUT_S, exit=True)
            print(f"rank {rank}: {case.name}", file=sys.stderr, flush=True)
            report.write(json.dumps(dataclasses.asdict(run(case, store, rank, size))) + "\n")
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
