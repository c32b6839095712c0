"""Examples, started as a user starts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# What Open MPI asks for as root and with fewer cores than ranks; other MPIs ignore it.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def run(
    example: str, ranks: int, *arguments: str, cwd: Path, survivors: bool = False
) -> subprocess.CompletedProcess[str]:
    """An example on that many ranks: with mpirun, or as one plain process.

    Args:
        survivors: whether they go on when one is killed, which takes an Open MPI with ULFM.
    """
    launcher = []
    if ranks > 1:
        mpirun = shutil.which("mpirun")
        if mpirun is None:
            pytest.skip("there is no mpirun on PATH")
        launcher = [mpirun, "-np", str(ranks)]
        if survivors:
            info = shutil.which("ompi_info") or pytest.skip("needs Open MPI 5")
            about = subprocess.run([info], capture_output=True, text=True).stdout
            if "FT MPI support: yes" not in about:
                pytest.skip("needs an Open MPI with ULFM")
            launcher[1:1] = ["--with-ft", "ulfm"]
    return subprocess.run(
        [*launcher, sys.executable, str(EXAMPLES / example), *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=150,
    )


def folder_of(example: str, ranks: int, *arguments: str, cwd: Path) -> Path:
    """What a run leaves."""
    before = set(cwd.glob("runs/*"))
    done = run(example, ranks, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    (folder,) = set(cwd.glob("runs/*")) - before
    return folder
