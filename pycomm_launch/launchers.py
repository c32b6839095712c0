"""Which launcher started this process, as a pure function of its environment.

Environments nest: a batch script's variables are still there under its ``mpirun``, and those of
``mpirun`` under a ``torchrun`` that it starts. The innermost launcher is the one that started
*this* process. An environment does not tell the order of nesting, so ``detect`` asks in the order
in which launchers are nested in practice, innermost first:

    torchrun          per node under mpirun or srun, or in a pod
    Open MPI          in a batch job, in a pod, started with its own daemons by srun
    MPICH, Intel MPI  (Hydra) the same; its PMI_* replace those of an outer srun or PALS
    PALS              the outermost on a Cray, beside the batch system
    srun              a real step only
    PMIx              another PMIx launcher: it gives the rank, and only MPI knows the size
    torch variables   a pod that a training operator gave RANK, WORLD_SIZE and MASTER_ADDR
    none              a world of one

What a batch system leaves in its job script (``SLURM_PROCID``, ``SLURM_NTASKS``) is no launcher.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class LaunchError(ValueError):
    """A launcher's variables are incomplete or make no sense."""


class Launcher(enum.Enum):
    """Who started this process; the value is its name in messages."""

    TORCHRUN = "torchrun"
    OPEN_MPI = "Open MPI's mpirun"
    HYDRA = "the mpiexec of MPICH or Intel MPI"
    PALS = "PALS mpiexec"
    SRUN = "srun"
    PMIX = "a PMIx launcher"
    TORCH_ENV = "torch's environment variables"
    NONE = "no launcher"


class Meeting(enum.Enum):
    """How the ranks find each other."""

    MPI = "MPI"
    STORE = "torch's TCPStore"
    ALONE = "alone"


@dataclass(frozen=True)
class Launch:
    """What the environment says about this process's place among the ranks."""

    launcher: Launcher
    rank: int
    world_size: int | None  # None: only MPI knows
    local_rank: int | None
    local_size: int | None
    meeting: Meeting
    variables: tuple[str, ...]  # what it was read from

    def announcement(self, environ: Mapping[str, str]) -> str:
        """The variables with their values, for messages."""
        return ", ".join(f"{name}={environ.get(name)}" for name in self.variables)


def detect(environ: Mapping[str, str]) -> Launch:
    """Find the innermost launcher in ``environ``.

    Raises:
        LaunchError: the launcher's variables are incomplete or make no sense.
    """
    for recognise in (_torchrun, _open_mpi, _hydra, _pals, _srun, _pmi, _pmix, _torch_env):
        launch = recognise(environ)
        if launch is not None:
            return launch
    return Launch(Launcher.NONE, 0, 1, 0, 1, Meeting.ALONE, ())


def _torchrun(environ: Mapping[str, str]) -> Launch | None:
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    _port_of_store(environ)
    return _read(
        environ,
        Launcher.TORCHRUN,
        Meeting.STORE,
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_size="LOCAL_WORLD_SIZE",
    )


def _open_mpi(environ: Mapping[str, str]) -> Launch | None:
    if not _any(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        return None
    return _read(
        environ,
        Launcher.OPEN_MPI,
        Meeting.MPI,
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    )


def _hydra(environ: Mapping[str, str]) -> Launch | None:
    # Of those who set PMI_RANK (srun --mpi=pmi2, PALS, Flux), Hydra alone sets MPI_LOCALRANKID.
    if "MPI_LOCALRANKID" not in environ or not _any(environ, "PMI_RANK", "PMI_SIZE"):
        return None
    return _read(
        environ,
        Launcher.HYDRA,
        Meeting.MPI,
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
    )


def _pals(environ: Mapping[str, str]) -> Launch | None:
    if "PALS_RANKID" not in environ:
        return None
    # With --pmi=pmix there is no PMI_SIZE, and PALS has no variable of its own for the size.
    size_unknown = "PMI_SIZE" not in environ and "PMIX_RANK" in environ
    return _read(
        environ,
        Launcher.PALS,
        Meeting.MPI,
        rank="PALS_RANKID",
        world_size=None if size_unknown else "PMI_SIZE",
        local_rank="PALS_LOCAL_RANKID",
        local_size="PALS_LOCAL_SIZE" if "PALS_LOCAL_SIZE" in environ else "PMI_LOCAL_SIZE",
    )


# Step ids from here on are not steps that srun made: batch script 0xfffffffb, interactive shell
# 0xfffffffa, external step 0xfffffffc, pending step 0xfffffffd (slurm.h).
_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0


def _srun(environ: Mapping[str, str]) -> Launch | None:
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    if not _is_number(step) or int(step) >= _FIRST_SPECIAL_SLURM_STEP:
        return None
    return _read(
        environ,
        Launcher.SRUN,
        Meeting.MPI,
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_size=None,
    )


def _pmi(environ: Mapping[str, str]) -> Launch | None:
    # Old Hydra versions, and others that speak PMI-1.
    if not _any(environ, "PMI_RANK", "PMI_SIZE"):
        return None
    return _read(
        environ,
        Launcher.HYDRA,
        Meeting.MPI,
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="PMI_LOCAL_RANK",
        local_size="PMI_LOCAL_SIZE",
    )


def _pmix(environ: Mapping[str, str]) -> Launch | None:
    if "PMIX_RANK" not in environ or "PMIX_NAMESPACE" not in environ:
        return None
    return _read(
        environ,
        Launcher.PMIX,
        Meeting.MPI,
        rank="PMIX_RANK",
        world_size=None,
        local_rank=None,
        local_size=None,
    )


def _torch_env(environ: Mapping[str, str]) -> Launch | None:
    if not _any(environ, "RANK", "WORLD_SIZE"):
        return None
    launch = _read(
        environ,
        Launcher.TORCH_ENV,
        Meeting.STORE,
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_size="LOCAL_WORLD_SIZE",
    )
    if launch.meeting is Meeting.STORE:
        _port_of_store(environ)
    return launch


def _read(
    environ: Mapping[str, str],
    launcher: Launcher,
    meeting: Meeting,
    *,
    rank: str,
    world_size: str | None,
    local_rank: str | None,
    local_size: str | None,
) -> Launch:
    """Read the named variables; ``rank`` and ``world_size`` must be there, the local ones may."""
    pair = (rank,) if world_size is None else (rank, world_size)
    for name, other in zip(pair, reversed(pair), strict=True):
        if name not in environ:
            raise LaunchError(
                f"init: {launcher.value} left {name} unset"
                + (f" beside {other}={_shown(environ[other])!r}" if other in environ else "")
                + f".\n  Set both, or unset {' and '.join(pair)} to run as a world of one."
            )
    world = None if world_size is None else _integer(environ, world_size, at_least=1)
    index = _integer(environ, rank, at_least=0)
    if world is not None and index >= world:
        raise LaunchError(
            f"init: {rank}={index} is not below {world_size}={world}.\n"
            f"  Ranks run from 0 to {world - 1}; these variables come from {launcher.value}: "
            "were they set by hand, or are they left over from another launcher?"
        )
    local = [name for name in (local_rank, local_size) if name is not None and name in environ]
    return Launch(
        launcher=launcher,
        rank=index,
        world_size=world,
        local_rank=_optional_integer(environ, local_rank, at_least=0),
        local_size=_optional_integer(environ, local_size, at_least=1),
        meeting=Meeting.ALONE if world == 1 else meeting,
        variables=(*pair, *local),
    )


def _any(environ: Mapping[str, str], *names: str) -> bool:
    return any(name in environ for name in names)


def _integer(environ: Mapping[str, str], name: str, *, at_least: int) -> int:
    text = environ[name].strip()
    if not _is_number(text) or not at_least <= int(text) <= _MOST:
        raise LaunchError(
            f"init: {name}={_shown(environ[name])!r} is not an integer from {at_least} to "
            f"{_MOST}.\n"
            f"  It is the launcher's to set; unset it if no launcher runs."
        )
    return int(text)


_MOST = 2**31 - 1  # an int of MPI


def _shown(text: str | None) -> str | None:
    return text if text is None or len(text) <= 40 else text[:37] + "..."


def _is_number(text: str) -> bool:
    """Digits, and no more of them than ``int`` would take."""
    return text.isascii() and text.isdecimal() and len(text) <= 10


def _optional_integer(environ: Mapping[str, str], name: str | None, *, at_least: int) -> int | None:
    if name is None or name not in environ:
        return None
    return _integer(environ, name, at_least=at_least)


def _port_of_store(environ: Mapping[str, str]) -> int:
    """The port of torch's store; its host must be set as well."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            raise LaunchError(
                f"init: RANK={_shown(environ.get('RANK'))} and "
                f"WORLD_SIZE={_shown(environ.get('WORLD_SIZE'))} announce several "
                f"ranks, but {name} is not set, where they would meet.\n"
                "  Start with torchrun or mpirun, or unset RANK and WORLD_SIZE to run as a world "
                "of one."
            )
    port = _integer(environ, "MASTER_PORT", at_least=1)
    if port > 65535:
        raise LaunchError(
            f"init: MASTER_PORT={port} is not a TCP port (1 to 65535).\n"
            "  Set the one where rank 0, or torchrun's agent, keeps torch's store."
        )
    return port
