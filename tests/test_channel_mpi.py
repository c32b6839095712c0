"""Who may have the MPI transport, and what everybody else is told.

That messages arrive is tested by every test that runs on several hosts. A case here that needs MPI
with settings of its own is a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest

from pycomm import mpi_library
from pycomm.errors import CommError

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("pycomm._mpi") is None, reason="this pycomm was built without MPI"
)

MAKE_CHANNEL = """
from pycomm import mpi_library
from mpi4py import MPI
try:
    mpi_library.load().make_channel({comm})
except Exception as error:
    print(type(error).__name__, error)
else:
    print("made")
"""


def environment_without_launcher() -> dict[str, str]:
    """This process's, so that MPI starts a world of one even where pytest runs under mpirun."""
    launcher = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_LOCAL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path)}


def made(before: str = "", comm: str = "MPI.COMM_WORLD") -> str:
    """What one process without a launcher prints when it makes a channel."""
    result = subprocess.run(
        [sys.executable, "-c", before + MAKE_CHANNEL.format(comm=comm)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment_without_launcher(),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@needs_mpi
def test_a_channel_is_made_on_the_library_that_mpi4py_loaded() -> None:
    assert made() == "made"


@needs_mpi
@pytest.mark.parametrize("level", ["single", "funneled", "serialized"])
def test_a_thread_level_below_multiple_is_refused(level: str) -> None:
    message = made(f"import mpi4py; mpi4py.rc.thread_level = {level!r}")
    assert message.startswith(f"CommError init: MPI runs at thread level {level.upper()}")
    assert 'mpi4py.rc.thread_level = "multiple"' in message


@needs_mpi
def test_a_sufficient_thread_level_is_taken() -> None:
    assert made("import mpi4py; mpi4py.rc.thread_level = 'multiple'") == "made"


@needs_mpi
def test_mpi_must_be_running() -> None:
    not_yet = made("import mpi4py; mpi4py.rc.initialize = False")
    assert not_yet.startswith("CommError init: MPI is not initialised.")
    over = made("from mpi4py import MPI; MPI.Finalize()")
    assert over.startswith("CommError init: MPI is finalised already.")


@needs_mpi
@pytest.mark.parametrize("comm", ["3", "MPI.COMM_NULL", "MPI.BYTE"])
def test_what_is_no_communicator_is_refused(comm: str) -> None:
    message = made(comm=comm)
    assert message.startswith("InvalidArgumentError init: comm is ")
    assert "not an intra-communicator of mpi4py" in message


def refuse_import(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    def import_module(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)


@needs_mpi
def test_a_build_without_mpi_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_import(monkeypatch, ModuleNotFoundError("no module", name="pycomm._mpi"))
    with pytest.raises(CommError, match=r"built without MPI.*\n.*mpicc on PATH"):
        mpi_library.load()


@needs_mpi
@pytest.mark.parametrize(
    ("soname", "family"),
    [
        ("libmpi.so.12", "MPICH or Intel MPI"),
        ("libmpi.so.40", "Open MPI"),
        ("libmpi.so.99", "another MPI"),
    ],
)
def test_a_build_for_another_mpi_names_both(
    monkeypatch: pytest.MonkeyPatch, soname: str, family: str
) -> None:
    from mpi4py import MPI

    refuse_import(monkeypatch, ImportError(f"{soname}: cannot open shared object file"))
    with pytest.raises(CommError) as caught:
        mpi_library.load()
    text = str(caught.value)
    assert f"built for {family}, but mpi4py loaded {MPI.get_vendor()[0]} " in text
    assert f"{soname}: cannot open shared object file" in text


@needs_mpi
def test_a_failure_that_is_not_about_mpi_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_import(monkeypatch, ModuleNotFoundError("no module", name="pycomm._core"))
    with pytest.raises(ModuleNotFoundError):
        mpi_library.load()
