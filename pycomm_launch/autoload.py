"""What ``import torch`` runs of pycomm, by the entry point ``torch.backends`` of the package.

It makes "pycomm" a name that ``torch.distributed.init_process_group`` knows, and lets ``env://``,
where torch's ranks meet by default, work under every launcher that pycomm knows: under ``mpirun``
torch by itself finds neither its rank nor a place to meet.

Every process that imports torch runs this, whether it will communicate or not: it imports nothing
of pycomm, starts nothing, and whatever goes wrong in it is a warning. ``import torch`` without it:
``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

from pycomm_launch.launchers import Launcher, LaunchError, Meeting, detect

BACKEND = "pycomm"
# Set to 1: who asks torch for gloo, for nccl, or for nothing in particular gets pycomm. For
# trainers that leave no choice.
REDIRECT = "PYCOMM_TORCH_BACKEND"

_REDIRECTED = ("gloo", "nccl", "undefined")


def autoload() -> None:
    """The entry point. May be called again; never raises."""
    try:
        set_torch_variables(os.environ)
        _prepare_torch()
    except Exception as problem:
        warnings.warn(
            f"pycomm did not register as a backend of torch.distributed: {problem!r}.\n"
            "  torch works without it. Is this PyTorch one of those that pycomm supports (2.6 and "
            "later)?",
            RuntimeWarning,
            stacklevel=2,
        )


def set_torch_variables(environ: MutableMapping[str, str]) -> None:
    """Say in torch's variables what another launcher said in its own.

    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` are what torch, and trainers
    when they are imported, read. Nothing is changed where one of the first two is set.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return
    try:
        launch = detect(environ)
    except LaunchError:
        return  # pycomm.init() explains it to who wants to communicate
    if launch.launcher is Launcher.NONE or launch.world_size is None:
        return
    environ["RANK"] = str(launch.rank)
    environ["WORLD_SIZE"] = str(launch.world_size)
    if launch.local_rank is not None:
        environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    if launch.local_size is not None:
        environ.setdefault("LOCAL_WORLD_SIZE", str(launch.local_size))


def _prepare_torch() -> None:
    import torch.distributed as dist

    if not dist.is_available() or BACKEND in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(
        BACKEND, _create_process_group, extended_api=True, devices=["cpu", "cuda"]
    )
    _let_launchers_meet()
    if os.environ.get(REDIRECT) == "1":
        _redirect()


def _create_process_group(options: Any, backend_options: object) -> Any:
    from pycomm.torch_backend import create_process_group

    return create_process_group(options, backend_options)


def _let_launchers_meet() -> None:
    """``env://`` asks MPI for rank 0's address where no variable tells it."""
    # As an attribute of torch.distributed, the name is a function. Torch registers no scheme twice.
    handlers = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
    through_environment = handlers["env"]

    @functools.wraps(through_environment)
    def meet(url: str, *args: Any, **kwargs: Any) -> Any:
        # A port alone is no place: Accelerate sets one, always the same.
        if not os.environ.get("MASTER_ADDR"):
            _provide_address()
        return through_environment(url, *args, **kwargs)

    handlers["env"] = meet


def _provide_address() -> None:
    try:
        launch = detect(os.environ)
    except LaunchError:
        return  # torch says which of its own variables are missing
    # Variables of torch's own were set above: the launcher's still come first.
    if launch.meeting is not Meeting.STORE and launch.launcher is not Launcher.NONE:
        from pycomm.torch_backend.address import provide_address

        provide_address(os.environ)


def _redirect() -> None:
    """Let torch make groups of pycomm where it would make ones of its own."""
    from torch.distributed import distributed_c10d

    make_group: Callable[..., Any] = distributed_c10d._new_process_group_helper

    @functools.wraps(make_group)
    def make_pycomm_group(
        group_size: int, group_rank: int, global_ranks: Any, backend: Any, *args: Any, **kwargs: Any
    ) -> Any:
        backend = BACKEND if _is_torchs_own(str(backend)) else backend
        return make_group(group_size, group_rank, global_ranks, backend, *args, **kwargs)

    setattr(distributed_c10d, make_group.__name__, make_pycomm_group)


def _is_torchs_own(backend: str) -> bool:
    """Whether it is one that ``_REDIRECTED`` lists, or several: "cpu:gloo,cuda:nccl"."""
    names = [part.rpartition(":")[2] for part in backend.lower().split(",")]
    return all(name in _REDIRECTED for name in names)
