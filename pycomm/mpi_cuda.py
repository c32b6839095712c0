"""Whether the MPI that mpi4py loads takes pointers to GPU memory ("CUDA-aware").

What the library says of itself begins it: a "no" is believed, a "yes" has to be shown, by 4 KiB of
GPU memory that a process sends itself. An MPI that takes such a pointer for one to the host's
memory crashes there, so all of this happens in a process of its own: MPI starts in it, as a world
of one.

    python -m pycomm.mpi_cuda [CUDART [LIBRARY]]

is that process. CUDART is the file of the CUDA runtime; LIBRARY is asked in MPI's stead, in tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

from pycomm import gpu_libraries
from pycomm.errors import CommError, InvalidArgumentError

_MESSAGE_BYTES = 4096
_TIMEOUT_S = 60
_TO_GPU, _FROM_GPU = 1, 2  # cudaMemcpyKind
_TRYING = "trying"  # printed just before what may crash
_CUDA = 0  # MPICH's MPIX_GPU_SUPPORT_CUDA
# By these a process takes itself for a rank of a job that is under way.
_LAUNCHERS = ("OMPI_COMM_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_LOCAL", "PALS_", "SLURM_")


class Answer(NamedTuple):
    """Whether MPI takes pointers to GPU memory; None: nobody can tell here."""

    aware: bool | None
    reason: str


def problem() -> str:
    """Why the MPI of this process takes no pointers to GPU memory; empty: it does."""
    try:
        aware, reason = detect(os.environ, gpu_libraries.report().runtime_file)
    except CommError as error:
        return str(error)
    return "" if aware else reason


def detect(
    environ: Mapping[str, str], cuda_library: str, *, asked_library: str | None = None
) -> Answer:
    """Find out, in about two seconds.

    Args:
        environ: ``PYCOMM_MPI_CUDA`` (0 or 1) in it goes before what is found.
        cuda_library: the file of the CUDA runtime; empty: there is none.
        asked_library: a file that is asked in the stead of MPI's own, in tests.

    Raises:
        InvalidArgumentError: ``PYCOMM_MPI_CUDA`` is neither 0 nor 1.
    """
    override = environ.get("PYCOMM_MPI_CUDA")
    if override is not None:
        if override not in ("0", "1"):
            raise InvalidArgumentError(
                f"PYCOMM_MPI_CUDA={override!r} is neither 0 nor 1. Unset it, and it is found out."
            )
        return Answer(override == "1", f"PYCOMM_MPI_CUDA is {override}")
    arguments = [cuda_library] if asked_library is None else [cuda_library, asked_library]
    alone = {name: value for name, value in environ.items() if not name.startswith(_LAUNCHERS)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pycomm.mpi_cuda", *arguments],
            env=alone,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"MPI, or a message to oneself, takes longer than {_TIMEOUT_S} s")
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode == 0:
        aware, reason = json.loads(last)
        return Answer(aware, reason)
    end = f"exit status {done.returncode}"
    if done.returncode < 0:
        end = signal.Signals(-done.returncode).name
    if last == _TRYING:
        return Answer(False, f"a message of GPU memory ends the process ({end})")
    cause = (done.stderr.splitlines() or ["it says nothing"])[-1]
    return Answer(None, f"MPI does not start in a process of its own ({end}): {cause}")


def _answer(cuda_library: str, asked_library: str | None) -> Answer:
    from mpi4py import MPI  # starts it

    word = _own_word(ctypes.CDLL(asked_library or MPI.__file__))
    if word.aware is False:
        return word
    if not cuda_library:
        return Answer(None, f"{word.reason}, and there is no CUDA runtime to try it with")
    cuda = ctypes.CDLL(cuda_library)
    count = ctypes.c_int(0)
    if cuda.cudaGetDeviceCount(ctypes.byref(count)) != 0 or count.value == 0:
        return Answer(None, f"{word.reason}, and there is no GPU to try it on")

    sent = bytes(i % 251 for i in range(_MESSAGE_BYTES))
    received = ctypes.create_string_buffer(_MESSAGE_BYTES)
    source, target = _room(cuda), _room(cuda)
    _copy(cuda, source, sent, _TO_GPU)
    _copy(cuda, target, bytes(_MESSAGE_BYTES), _TO_GPU)
    print(_TRYING, flush=True)
    MPI.COMM_SELF.Sendrecv(
        [MPI.buffer.fromaddress(source.value or 0, _MESSAGE_BYTES), MPI.BYTE],
        0,
        recvbuf=[MPI.buffer.fromaddress(target.value or 0, _MESSAGE_BYTES), MPI.BYTE],
        source=0,
    )
    _copy(cuda, received, target, _FROM_GPU)
    if received.raw != sent:
        return Answer(False, f"{word.reason}, and a message of GPU memory arrives as another one")
    return Answer(True, f"{word.reason}, and a message of GPU memory arrives")


def _own_word(library: ctypes.CDLL) -> Answer:
    """What the library says, by functions that it may lack: asked at run time, since the macros of
    mpi-ext.h tell of the library that pycomm was built with.
    """
    with contextlib.suppress(AttributeError):  # MPICH
        supported = ctypes.c_int(0)
        if library.MPIX_GPU_query_support(_CUDA, ctypes.byref(supported)) == 0:
            return _said("MPIX_GPU_query_support", bool(supported.value))
    with contextlib.suppress(AttributeError):  # Open MPI
        return _said("MPIX_Query_cuda_support", bool(library.MPIX_Query_cuda_support()))
    return Answer(None, "MPI has no function that says")


def _said(function: str, aware: bool) -> Answer:
    return Answer(aware, f"{function} says {'yes' if aware else 'no'}")


def _room(cuda: ctypes.CDLL) -> ctypes.c_void_p:
    address = ctypes.c_void_p()
    result = cuda.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(_MESSAGE_BYTES))
    if result != 0:
        raise RuntimeError(f"cudaMalloc failed: {result}")
    return address


def _copy(cuda: ctypes.CDLL, to: object, source: object, kind: int) -> None:
    result = cuda.cudaMemcpy(to, source, ctypes.c_size_t(_MESSAGE_BYTES), kind)
    if result != 0:
        raise RuntimeError(f"cudaMemcpy failed: {result}")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer
    cuda_file, asked_file = [*sys.argv[1:], "", ""][:2]
    print(json.dumps(_answer(cuda_file, asked_file or None)), flush=True)
    # Not through MPI_Finalize and CUDA's own end: what they do is not the question.
    os._exit(0)
