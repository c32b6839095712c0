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
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from typing import Any

from pycomm_launch.launchers import Launcher, LaunchError, Meeting, detect

BACKEND = "pycomm"
# Set to 1: who asks torch for gloo, for nccl, or for nothing in particular gets pycomm. For
# trainers that leave no choice. 0, or unset: torch's groups stay torch's own.
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
    _let_barriers_be_monitored()
    if _wants_redirection(os.environ):
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
    def meet(url: str, timeout: timedelta | None = None, **kwargs: Any) -> Any:
        # Where the URL has a rank, the caller says who he is. A port alone is no place: Accelerate
        # sets one, always the same.
        contradicted = "rank=" not in url and warn_of_contradiction(os.environ)
        address = _address()
        unknown = address[0] is None or address == _provided.get(os.getpid())
        if unknown and not contradicted:
            _provide_address(timeout)
        if timeout is not None:
            kwargs["timeout"] = timeout
        return through_environment(url, **kwargs)

    handlers["env"] = meet


def warn_of_contradiction(environ: Mapping[str, str]) -> bool:
    """Torch's variables count, even where the launcher says something else; whether it does.

    They may be left over: in a shell of a pod with ``RANK=0`` and ``WORLD_SIZE=1``, each rank of
    an ``mpirun`` would train alone. Processes that a rank has spawned are more than the launcher's.
    """
    try:
        launch = detect(environ)
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return False  # torch, or pycomm, says what is wrong
    if launch.meeting is not Meeting.MPI or launch.world_size is None:
        return False
    same_size = size == launch.world_size
    contradicted = size < launch.world_size or (same_size and rank != launch.rank)
    if contradicted:
        warnings.warn(
            f"init_process_group: RANK={rank} and WORLD_SIZE={size} say that this is rank {rank} "
            f"of {size}, but {launch.launcher.value} started it as rank {launch.rank} of "
            f"{launch.world_size} ({launch.announcement(environ)}). RANK and WORLD_SIZE count.\n"
            "  Are they left over? Unset both: they are then set to what the launcher says.",
            RuntimeWarning,
            stacklevel=2,
        )
    return contradicted


def _address() -> tuple[str | None, str | None]:
    return os.environ.get("MASTER_ADDR") or None, os.environ.get("MASTER_PORT") or None


# What this process found out, and did not get from its user. It is good for one group: the store
# that rank 0 keeps there goes away with the group, and who makes the next one a little earlier
# than rank 0 would meet nobody in it.
_provided: dict[int, tuple[str | None, str | None]] = {}


def _provide_address(timeout: timedelta | None) -> None:
    try:
        launch = detect(os.environ)
    except LaunchError:
        return  # torch says which of its own variables are missing
    # Variables of torch's own were set above: the launcher's still come first.
    if launch.meeting is not Meeting.STORE and launch.launcher is not Launcher.NONE:
        from pycomm.torch_backend.address import provide_address

        provide_address(os.environ, timeout.total_seconds() if timeout is not None else None)
        _provided[os.getpid()] = _address()


def _wants_redirection(environ: Mapping[str, str]) -> bool:
    value = environ.get(REDIRECT, "")
    if value not in ("", "0", "1"):
        warnings.warn(
            f"{REDIRECT}={value!r} is neither 0 nor 1: torch's groups stay torch's own.\n"
            "  Set it to 1 for groups of pycomm where gloo, nccl or no backend is asked for.",
            RuntimeWarning,
            stacklevel=2,
        )
    return value == "1"


def _let_barriers_be_monitored() -> None:
    """``monitored_barrier`` refuses every group that does not call itself gloo."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    of_gloo: Callable[..., None] = distributed_c10d.monitored_barrier

    @functools.wraps(of_gloo)
    def monitored_barrier(
        group: Any = None, timeout: Any = None, wait_all_ranks: bool = False
    ) -> None:
        if distributed_c10d._rank_not_in_group(group) or dist.get_backend(group) != BACKEND:
            of_gloo(group, timeout, wait_all_ranks)
        else:
            members: Any = distributed_c10d._get_default_group() if group is None else group
            members.monitored_barrier(timeout, wait_all_ranks)

    for module in (dist, distributed_c10d):
        setattr(module, of_gloo.__name__, monitored_barrier)


def _redirect() -> None:
    """Let torch make groups of pycomm where it would make ones of its own."""
    from torch.distributed import distributed_c10d

    make_group: Callable[..., Any] = distributed_c10d._new_process_group_helper

    @functools.wraps(make_group)
    def make_pycomm_group(
        group_size: int, group_rank: int, global_ranks: Any, backend: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if _is_torchs_own(str(backend)):
            backend = BACKEND
            if "backend_options" in kwargs:  # those of the backend that was asked for
                kwargs["backend_options"] = None
        return make_group(group_size, group_rank, global_ranks, backend, *args, **kwargs)

    setattr(distributed_c10d, make_group.__name__, make_pycomm_group)


def _is_torchs_own(backend: str) -> bool:
    """Whether it is one that ``_REDIRECTED`` lists, or several: "cpu:gloo,cuda:nccl"."""
    names = [part.rpartition(":")[2] for part in backend.lower().split(",")]
    return all(name in _REDIRECTED for name in names)
