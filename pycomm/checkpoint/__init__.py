"""Checkpoints that any layout of ranks can resume from, in torch.distributed.checkpoint's format.

``save`` writes one from all ranks, ``load`` restores it on all ranks, ``read`` shows it to one
process. torch.distributed is not initialised: its planners and file format are driven with pycomm's
own collectives.
"""

from pycomm.checkpoint.folder import exists
from pycomm.checkpoint.loading import load
from pycomm.checkpoint.reading import read
from pycomm.checkpoint.saving import save

__all__ = ["exists", "load", "read", "save"]
