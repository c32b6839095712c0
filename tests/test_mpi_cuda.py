"""Whether MPI takes GPU memory: what a library says, and what a message shows. No GPU is used.

The libraries that are asked, and the CUDA runtimes, are stand-ins compiled here; MPI is the real
one, started in processes of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pycomm import mpi_cuda
from pycomm.errors import InvalidArgumentError
from pycomm.mpi_cuda import Answer

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed"
)


def library(folder: Path, name: str, source: str) -> str:
    file = folder / f"lib{name}.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(file), "-xc", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    return str(file)


OPEN_MPI = "int MPIX_Query_cuda_support(void) {{ return {0}; }}"
# An unknown kind of GPU is an error there.
MPICH = "int MPIX_GPU_query_support(int kind, int *yes) {{ *yes = {0}; return kind != 0; }}"
SILENT = "int nothing;"


def cudart(
    folder: Path, *, gpus: int = 1, memory: str = "malloc(bytes)", back: str = "from"
) -> str:
    """A CUDA runtime whose memory is the host's, unless it is said to be elsewhere."""
    return library(
        folder,
        "cudart",
        f"""
        #include <stdlib.h>
        #include <string.h>
        #include <sys/mman.h>
        int cudaGetDeviceCount(int *count) {{ *count = {gpus}; return 0; }}
        int cudaMalloc(void **at, size_t bytes) {{ *at = {memory}; return 0; }}
        int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {{
          if ({int("mmap" not in memory)}) memcpy(to, kind == 2 ? {back} : from, bytes);
          return 0;
        }}
        """,
    )


@pytest.fixture
def environ() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([p or os.getcwd() for p in sys.path])}


def test_the_environment_goes_before_what_is_found() -> None:
    assert mpi_cuda.detect({"PYCOMM_MPI_CUDA": "1"}, "") == Answer(True, "PYCOMM_MPI_CUDA is 1")
    assert mpi_cuda.detect({"PYCOMM_MPI_CUDA": "0"}, "") == Answer(False, "PYCOMM_MPI_CUDA is 0")
    with pytest.raises(InvalidArgumentError, match="PYCOMM_MPI_CUDA='yes' is neither 0 nor 1"):
        mpi_cuda.detect({"PYCOMM_MPI_CUDA": "yes"}, "")


@needs_mpi
@pytest.mark.parametrize(
    ("says", "function"),
    [(OPEN_MPI, "MPIX_Query_cuda_support"), (MPICH, "MPIX_GPU_query_support")],
    ids=["Open MPI", "MPICH"],
)
def test_a_no_is_believed_and_a_yes_has_to_be_shown(
    tmp_path: Path, environ: dict[str, str], says: str, function: str
) -> None:
    cuda = cudart(tmp_path)
    no = library(tmp_path, "no", says.format(0))
    assert mpi_cuda.detect(environ, cuda, asked_library=no) == Answer(False, f"{function} says no")
    yes = library(tmp_path, "yes", says.format(1))
    assert mpi_cuda.detect(environ, cuda, asked_library=yes) == Answer(
        True, f"{function} says yes, and a message of GPU memory arrives"
    )


@needs_mpi
def test_a_library_that_says_nothing_is_tried(tmp_path: Path, environ: dict[str, str]) -> None:
    silent = library(tmp_path, "silent", SILENT)
    assert mpi_cuda.detect(environ, cudart(tmp_path), asked_library=silent) == Answer(
        True, "MPI has no function that says, and a message of GPU memory arrives"
    )


@needs_mpi
def test_a_yes_that_is_not_true_ends_a_process_of_its_own(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    yes = library(tmp_path, "yes", OPEN_MPI.format(1))
    # As GPU memory does, it has an address, and the host may not touch it.
    out_of_reach = "mmap(0, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)"
    answer = mpi_cuda.detect(environ, cudart(tmp_path, memory=out_of_reach), asked_library=yes)
    assert answer.aware is False
    assert answer.reason.startswith("a message of GPU memory ends the process (")
    assert not list(Path.cwd().glob("core*"))


@needs_mpi
def test_a_message_that_arrives_as_another_one_is_a_no(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    yes = library(tmp_path, "yes", OPEN_MPI.format(1))
    cuda = cudart(tmp_path, back="calloc(1, bytes)")
    answer = mpi_cuda.detect(environ, cuda, asked_library=yes)
    assert answer.aware is False
    assert answer.reason.endswith("and a message of GPU memory arrives as another one")


@needs_mpi
def test_where_nothing_can_be_tried_nobody_can_tell(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    yes = library(tmp_path, "yes", OPEN_MPI.format(1))
    without_runtime = mpi_cuda.detect(environ, "", asked_library=yes)
    assert without_runtime.aware is None
    assert without_runtime.reason.endswith("there is no CUDA runtime to try it with")
    without_gpu = mpi_cuda.detect(environ, cudart(tmp_path, gpus=0), asked_library=yes)
    assert without_gpu.aware is None
    assert without_gpu.reason.endswith("there is no GPU to try it on")


def test_an_mpi_that_does_not_start_is_told(tmp_path: Path, environ: dict[str, str]) -> None:
    package = tmp_path / "mpi4py"
    package.mkdir()
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environ["PYTHONPATH"]])
    (package / "__init__.py").write_text("raise RuntimeError('cannot load MPI library')")
    answer = mpi_cuda.detect(environ, "")
    assert answer.aware is None
    assert answer.reason.endswith("(exit status 1): RuntimeError: cannot load MPI library")
    (package / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGBUS)")
    assert "(SIGBUS): it says nothing" in mpi_cuda.detect(environ, "").reason
