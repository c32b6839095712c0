"""Other libraries, each in an environment of its own, and how their ranks are started."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pycomm.errors import CommError


@dataclass(frozen=True)
class MpiPeer:
    """An MPI from the package index.

    Attributes:
        label: what reports call it.
        wheel: the package that brings it.
        flags: what its mpirun needs.
        environ: variables that make waiting ranks yield their core; set when ranks outnumber cores.
    """

    label: str
    wheel: str
    flags: tuple[str, ...]
    environ: dict[str, str]


_AS_ROOT = ("--allow-run-as-root",) if os.geteuid() == 0 else ()

MPI_PEERS = {
    "openmpi": MpiPeer(
        "Open MPI",
        "openmpi",
        (*_AS_ROOT, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"),
        {"OMPI_MCA_mpi_yield_when_idle": "1"},
    ),
    "mpich": MpiPeer("MPICH", "mpich", (), {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}),
    "impi": MpiPeer(
        "Intel MPI",
        "impi-rt",
        (),
        {"I_MPI_THREAD_YIELD": "2", "I_MPI_SPIN_COUNT": "1"},
    ),
}
# By the backend of torch.distributed: c10d is pycomm itself, behind torch's own functions.
TORCH_PEERS = {"gloo": "gloo", "c10d": "pycomm"}
PEERS = (*MPI_PEERS, *TORCH_PEERS)

RANKS = Path(__file__).parent


def mpi_command(peer: str, ranks: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a peer's ranks; its environment is made if it is not there."""
    found = MPI_PEERS[peer]
    home = environment(found, folder / peer)
    crowded = ranks > (os.cpu_count() or 1)
    environ = _clean_environ() | (found.environ if crowded else {})
    environ["PATH"] = f"{home / 'bin'}{os.pathsep}{environ.get('PATH', '')}"
    environ["PYTHONPATH"] = str(RANKS)
    if peer == "impi":
        environ |= {"I_MPI_ROOT": str(home), "I_MPI_FABRICS": "shm"}
    command = [str(home / "bin" / "mpirun"), "-np", str(ranks), *found.flags]
    return [*command, str(home / "bin" / "python"), "-m", "ranks.mpi"], environ


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torch_commands(module: str, ranks: int, port: int) -> list[tuple[list[str], dict[str, str]]]:
    """Command and environment of each rank of pycomm or gloo, which meet at a port."""
    commands = []
    for rank in range(ranks):
        environ = _clean_environ() | {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        commands.append(([sys.executable, "-m", module], environ))
    return commands


def _clean_environ() -> dict[str, str]:
    """Ours, without what a launcher above left: the ranks started here are a job of their own."""
    launcher = (
        "OMPI_COMM_",
        "OMPI_FILE",
        "PMIX_",
        "PMI_",
        "PRTE_",
        "MPI_LOCAL",
        "HYDRA_",
        "TORCHELASTIC_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return kept | {"OMP_NUM_THREADS": "1"}


def environment(peer: MpiPeer, home: Path) -> Path:
    """A virtual environment with the peer's wheel and mpi4py; complete, or not there."""
    if (home / "complete").exists():
        return home
    print(f"bench: installing {peer.label} in {home} ...", file=sys.stderr)
    try:
        shutil.rmtree(home, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(home)])
        _run(
            [
                str(home / "bin" / "python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "numpy",
                "mpi4py",
                peer.wheel,
            ]
        )
        (home / "complete").touch()
    except OSError as error:
        raise CommError(
            f"cannot make {home}: {error}.\n  Pass --environments with a folder to write to."
        ) from error
    return home


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        last = [line for line in lines if not line.startswith("WARNING")][-3:]
        raise CommError(f"`{' '.join(command)}` failed: " + " ".join(last))
