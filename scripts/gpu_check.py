"""What `make gpu-check` does: GPU tests, faults and a table against bare NCCL, into gpu-report.md.

Runs with the standard library alone, so that it can say what is missing. `--find` only says whether
there is a GPU to check. Everything else needs `--python`, an interpreter whose environment has
pycomm and a PyTorch for CUDA (the Makefile makes one).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "gpu-report.md"

# Each fault, the ranks it needs and what some surviving rank has to print.
FAULTS = {
    "late": (2, "CommTimeoutError"),
    "killed": (2, "PeerLostError"),
    "shared": (2, "both use GPU"),
}
TEST_S = 300
TABLE_S = 3600


@dataclass
class Outcome:
    """Of one test or fault."""

    name: str
    passed: bool | None  # None: it was skipped
    text: str = ""  # why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--find", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--python", help="of the environment to be checked")
    args = parser.parse_args()
    problem = no_gpu()
    if problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 2
    if args.find:
        return 0
    if args.python is None:
        parser.error("--python is needed")
    return check(args.python)


def no_gpu() -> str:
    """Why nothing can be checked here; empty: there is a GPU and a driver."""
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/dxg").exists():
        return (
            "there is no NVIDIA driver on this machine, so there is no GPU to check.\n"
            "  Run it on a machine with an NVIDIA GPU, in a container with --gpus all."
        )
    listed = output_of(["nvidia-smi", "-L"])
    if shutil.which("nvidia-smi") and not re.search(r"^GPU \d+:", listed, re.MULTILINE):
        return "nvidia-smi lists no GPU.\n  In a container pass --gpus all; see `nvidia-smi`."
    return ""


def check(python: str) -> int:
    gpus = int(output_of([python, "-c", "import torch; print(torch.cuda.device_count())"]) or 0)
    if gpus == 0:
        print(
            f"gpu-check: the PyTorch of {python} finds no GPU.\n"
            "  Install one for CUDA (pip install torch), and compare its CUDA with the driver's "
            "(nvidia-smi).",
            file=sys.stderr,
        )
        return 2
    facts = facts_of(python)
    outcomes: list[Outcome] = []
    figures: dict[int, dict[str, Any] | str] = {}
    finished = False
    try:
        # All GPUs, and two where there are more: different paths in NCCL. One where there is one.
        for ranks in sorted({gpus, min(gpus, 2)}):
            outcomes += run_tests(python, ranks)
        for name, (ranks, expected) in FAULTS.items():
            # Two ranks share a GPU in one of them, on any machine.
            if name == "shared" or gpus >= ranks:
                outcomes.append(fault(python, name, ranks, expected))
            else:
                outcomes.append(Outcome(f"fault: {name}", None, f"needs {ranks} GPUs"))
        for ranks in sorted({gpus, min(gpus, 2)}):
            figures[ranks] = table(python, ranks)
        finished = True
    finally:  # what there is, is written, whatever ended it
        REPORT.write_text(report(facts, gpus, outcomes, figures, finished))
        print(f"\nSee {REPORT}.")
    failed = any(outcome.passed is False for outcome in outcomes)
    return 1 if failed or any(isinstance(each, str) for each in figures.values()) else 0


# --- what is run ----------------------------------------------------------------------------------


def torchrun(python: str, ranks: int, *arguments: str) -> list[str]:
    launcher = [python, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", *arguments]


def run(command: list[str], limit_s: float, **environ: str) -> tuple[int, str]:
    """Exit status and all that was printed; 124 and what there was by then, after the limit."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:  # nobody waits for its writers
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours
        )
        try:
            status = process.wait(limit_s)
            end = ""
        except subprocess.TimeoutExpired:
            end_all(process)
            status, end = 124, f"\n(ended after {limit_s:g} s)"
        except BaseException:
            end_all(process)
            raise
        printed.seek(0)
        return status, printed.read() + end


def end_all(process: subprocess.Popen[bytes], patience_s: float = 10) -> None:
    """End a launcher and its ranks, each of which has a session of its own."""
    ranks = descendants(process.pid)
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes that this one has started, and those they have."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, listed.read_text().split()):
                found += [child, *descendants(child)]
    return found


def run_tests(python: str, ranks: int, device: str = "cuda") -> list[Outcome]:
    """Every test in ranks of its own, so that one that hangs or crashes leaves the others alone."""
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=long"]
    listed = output_of([python, *pytest, "--collect-only", "-q", "tests/gpu"], device=device)
    names = re.findall(r"^tests/gpu/\S+\.py::.+$", listed, re.MULTILINE)
    if not names:
        return [Outcome(f"tests on {ranks} GPUs", False, f"pytest finds none:\n{listed}")]
    outcomes = []
    for number, name in enumerate(names):
        begun = time.monotonic()
        status, printed = run(
            torchrun(python, ranks, *pytest, name), TEST_S, PYCOMM_GPU_CHECK=device
        )
        outcome = verdict(f"{name} ({ranks} ranks)", status, printed)
        outcomes.append(outcome)
        word = {True: "passed", False: "FAILED", None: "skipped"}[outcome.passed]
        print(f"[{number + 1}/{len(names)}] {outcome.name}: {word}, "
              f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
    return outcomes


def verdict(name: str, status: int, printed: str) -> Outcome:
    """Of one test's ranks."""
    skipped = re.search(r"^SKIPPED \[\d+\] (.*)$", printed, re.MULTILINE)
    if status == 0 and skipped and not re.search(r"^PASSED ", printed, re.MULTILINE):
        return Outcome(name, None, skipped[1])
    if status == 0 and re.search(r"\b1 passed\b", printed):
        return Outcome(name, True)
    return Outcome(name, False, f"exit status {status}\n{printed[-6000:]}")


def fault(python: str, name: str, ranks: int, expected: str, device: str = "cuda") -> Outcome:
    """Ranks of which one misbehaves: the others must say so, in time."""
    status, printed = run(
        torchrun(python, ranks, "tests/gpu/faults.py", name), 120, PYCOMM_GPU_CHECK=device
    )
    # torchrun itself may end with an error: a rank was killed.
    passed = status != 124 and f"as expected: {expected}" in printed
    print(f"fault: {name}: {'passed' if passed else 'FAILED'}", flush=True)
    return Outcome(f"fault: {name}", passed, "" if passed else f"{status}\n{printed[-6000:]}")


def table(python: str, ranks: int, *arguments: str) -> dict[str, Any] | str:
    """The figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        program = ["benchmarks/gpu_table.py", "--json", str(figures), *arguments]
        status, printed = run(torchrun(python, ranks, *program), TABLE_S)
        if status != 0 or not figures.exists():
            return f"exit status {status}\n{printed[-6000:]}"
        return json.loads(figures.read_text())


def output_of(command: list[str], device: str = "cuda") -> str:
    """What it printed; empty if it cannot be run."""
    try:
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYCOMM_GPU_CHECK": device},
            capture_output=True, text=True, errors="replace", timeout=300,
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""


def facts_of(python: str) -> dict[str, str]:
    versions = (
        "import sys, torch; print(f'Python {sys.version.split()[0]}, torch {torch.__version__}, "
        "CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}')"
    )
    query = ["nvidia-smi", "--query-gpu=index,name,driver_version,memory.total", "--format=csv"]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": output_of(["git", "describe", "--always", "--dirty", "--abbrev=12"]).strip(),
        "GPUs": output_of(query).strip(),
        "versions": output_of([python, "-c", versions]).strip(),
        "topology": output_of(["nvidia-smi", "topo", "-m"]).strip(),
        "python -m pycomm info": output_of([python, "-m", "pycomm", "info"]).strip(),
        "NCCL_*": "\n".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NCCL_")),
    }


# --- what is written ------------------------------------------------------------------------------


def report(
    facts: dict[str, str],
    gpus: int,
    outcomes: list[Outcome],
    figures: dict[int, dict[str, Any] | str],
    finished: bool,
) -> str:
    failed = [outcome for outcome in outcomes if outcome.passed is False]
    skipped = [outcome for outcome in outcomes if outcome.passed is None]
    passed = sum(outcome.passed is True for outcome in outcomes)
    parts = ["# pycomm on GPUs\n", "Written by `make gpu-check`.\n"]
    if not finished:
        parts.append("**Not finished**: what follows is what was done before it was ended.\n")
    if gpus == 1:
        parts.append(
            "**One GPU**: no two ranks have exchanged anything. What needs two is listed as "
            "skipped.\n"
        )
    for name, text in facts.items():
        parts.append(f"{name}:\n\n```\n{text or '-'}\n```\n")
    parts.append(f"## Tests: {passed} passed, {len(failed)} failed, {len(skipped)} skipped\n")
    for outcome in failed:
        parts.append(f"### failed: {outcome.name}\n\n```\n{outcome.text}\n```\n")
    if skipped:
        lines = "".join(f"- {outcome.name}: {outcome.text}\n" for outcome in skipped)
        parts.append(f"Skipped:\n\n{lines}")
    for ranks, each in figures.items():
        parts.append(f"## Against bare NCCL, {ranks} ranks\n")
        parts.append(f"There are no figures:\n\n```\n{each}\n```\n" if isinstance(each, str)
                     else tables(each))  # fmt: skip
    if not figures:
        parts.append("## Against bare NCCL\n\nNot run.\n")
    return "\n".join(parts)


def tables(figures: dict[str, Any]) -> str:
    """Markdown: a table for each collective and dtype, then the training step."""
    parts = [
        f"Medians of {figures['rounds']} rounds in turns with {figures['peer']}; time of one call, "
        "algorithm and bus bandwidth as nccl-tests define them. Ratio: the peer's time over "
        "pycomm's.\n"
    ]
    keys = dict.fromkeys((row["collective"], row["dtype"]) for row in figures["rows"])
    for collective, dtype in keys:
        rows = [r for r in figures["rows"] if (r["collective"], r["dtype"]) == (collective, dtype)]
        contenders = list(rows[0]["seconds"])
        header = ["bytes"]
        for name in contenders:
            header += [f"{name}: us", "alg GB/s", "bus GB/s"]
        header += [f"ratio: {name}" for name in contenders[:-1]]
        lines = [header, ["---:"] * len(header)]
        for row in rows:
            cells = [str(row["nbytes"])]
            for name in contenders:
                taken = row["seconds"][name]
                bandwidth = row["nbytes"] / taken / 1e9
                cells += [f"{1e6 * taken:.1f}", f"{bandwidth:.2f}"]
                cells.append(f"{bandwidth * row['bus_factor']:.2f}")
            peer = row["seconds"][contenders[-1]]
            cells += [f"{peer / row['seconds'][name]:.2f}" for name in contenders[:-1]]
            lines.append(cells)
        parts.append(f"### {collective}, {dtype}\n")
        parts.append("".join("| " + " | ".join(line) + " |\n" for line in lines))
    step = figures["step"]
    lines = [["gradients synchronised by", "ms a step"], ["---", "---:"]]
    lines += [[name, f"{1e3 * taken:.2f}"] for name, taken in step.items()]
    parts.append(f"### A training step: 12 layers of {figures['width']}, 64 rows a rank, float32\n")
    parts.append("".join("| " + " | ".join(line) + " |\n" for line in lines))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
