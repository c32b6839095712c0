"""Ultralytics on several ranks without GPUs, by one line: ``import pycomm.ultralytics``.

Ultralytics trains on several GPUs, but with ``device="cpu"`` each process trains alone, whatever
the launcher announces. After this import ``device="cpu"`` under ``torchrun`` or ``mpirun`` means
a replica for each rank, and gradients averaged over them. What changes, for trainers on CPUs only:

- a trainer's world is the launcher's ranks, where Ultralytics counts GPUs;
- its process group is the one that the script has made already, or one on the backend "pycomm";
- its DistributedDataParallel is not given the index of a GPU (``device_ids=[None]``);
- its last validation is on the CPU, too: Ultralytics takes every rank for one that has a GPU.

On GPUs Ultralytics needs nothing but the environment variable PYCOMM_TORCH_BACKEND: see
docs/torch-programs.md. Tested with Ultralytics 8.4.

Raises:
    InvalidArgumentError: Ultralytics takes this process for another rank than the launcher does.
    ImportError: this Ultralytics has no such trainer.
"""

from __future__ import annotations

import datetime
import os
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import nn
from ultralytics.engine import validator
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOCAL_RANK, RANK, WORLD_SIZE

from pycomm.errors import InvalidArgumentError
from pycomm.launch import detect

TIMEOUT = datetime.timedelta(hours=3)  # as Ultralytics has it on GPUs

_launch = detect(os.environ)
if (max(RANK, 0), max(LOCAL_RANK, 0), WORLD_SIZE) != (
    _launch.rank,
    _launch.local_rank,
    _launch.world_size,
):
    raise InvalidArgumentError(
        f"import pycomm.ultralytics: Ultralytics takes this process for rank {RANK} of "
        f"{WORLD_SIZE}, local rank {LOCAL_RANK}, and {_launch.launcher.value} says "
        f"{_launch.announcement(os.environ)}.\n"
        "  It reads RANK, LOCAL_RANK and WORLD_SIZE when it is imported. `import torch` sets them "
        "from what the launcher says, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set; set them "
        "yourself where the launcher does not tell all three."
    )

try:
    _init, _setup_ddp, _setup_train, _final_eval = (
        BaseTrainer.__init__,
        BaseTrainer._setup_ddp,
        BaseTrainer._setup_train,
        BaseTrainer.final_eval,
    )
    _AutoBackend, _ = validator.AutoBackend, validator.get_torch_device_backend
except AttributeError as error:
    raise ImportError(
        f"pycomm.ultralytics: {error}: it was made for Ultralytics 8.4.\n"
        "  pip install 'ultralytics==8.4.*'"
    ) from error


def _init_with_ranks(trainer: Any, *args: Any, **options: Any) -> None:
    _init(trainer, *args, **options)
    if trainer.device.type == "cpu" and WORLD_SIZE > 1:
        trainer.world_size = WORLD_SIZE


def _setup_group(trainer: Any) -> None:
    if trainer.device.type != "cpu":
        _setup_ddp(trainer)
    elif not dist.is_initialized():
        dist.init_process_group("pycomm", timeout=TIMEOUT)


class _ReplicaOnCpu(nn.parallel.DistributedDataParallel):
    def __init__(self, module: nn.Module, device_ids: list[None], **options: Any) -> None:
        super().__init__(module, **options)


def _setup_replica(trainer: Any) -> None:
    replica: type[nn.Module] = nn.parallel.DistributedDataParallel
    if trainer.device.type == "cpu":
        replica = _ReplicaOnCpu
    with mock.patch.object(nn.parallel, "DistributedDataParallel", replica):
        _setup_train(trainer)


class _NoGpu:
    """What Ultralytics asks for the index of this rank's GPU."""

    def __init__(self, device_type: str) -> None:
        pass

    def current_device(self) -> int:
        return 0


def _validate_at_the_end(trainer: Any) -> None:
    def on_cpu(**options: Any) -> Any:
        return _AutoBackend(**{**options, "device": trainer.device})

    if trainer.device.type != "cpu" or WORLD_SIZE == 1:
        _final_eval(trainer)
    else:
        with mock.patch.multiple(validator, AutoBackend=on_cpu, get_torch_device_backend=_NoGpu):
            _final_eval(trainer)


BaseTrainer.__init__ = _init_with_ranks
BaseTrainer._setup_ddp = _setup_group
BaseTrainer._setup_train = _setup_replica
BaseTrainer.final_eval = _validate_at_the_end
