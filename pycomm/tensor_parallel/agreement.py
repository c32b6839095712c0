"""Whether ranks that split layers were given the same data."""

import zlib

import torch
from torch import Tensor

from pycomm._core import DType, Group
from pycomm.errors import MismatchError


def check_same(layer: str, argument: str, t: Tensor, group: Group) -> None:
    """Compare a CPU tensor between ranks. Not on GPUs, where that would wait for the device, nor in
    what torch compiles.

    Ranks that are given different batches would train, and learn nothing that makes sense.

    Raises:
        MismatchError: it differs.

    Cost: a checksum of the tensor, and a collective of no bytes.
    """
    if group.size == 1 or not t.is_cpu or torch.compiler.is_compiling():
        return
    checksum = zlib.crc32(t.detach().contiguous().numpy().data)
    # Part of the operation's name, hence of its signature; an error shows the first 47 characters.
    name = f"{layer} of {argument} with checksum {checksum:08x}"
    try:
        group.all_gather(0, 0, 0, DType.UINT8, name=name)
    except MismatchError as error:
        if str(error).count("with checksum") < 2:  # the others made another call
            raise
        raise MismatchError(
            f"{error}\n  Ranks that split layers need the same batches: let the sampler have "
            'rank=mesh.coordinate["dp"], num_replicas=mesh.shape["dp"].'
        ) from None
