"""Whether ranks that split layers were given the same data."""

import zlib

from torch import Tensor

from pycomm._core import DType, Group


def check_same(layer: str, argument: str, t: Tensor, group: Group) -> None:
    """Compare a CPU tensor between ranks; on GPUs that would wait for the device, and is not done.

    Ranks that are given different batches would train, and learn nothing that makes sense.

    Raises:
        MismatchError: it differs.

    Cost: a checksum of the tensor, and a collective of no bytes.
    """
    if group.size == 1 or not t.is_cpu:
        return
    checksum = zlib.crc32(t.detach().contiguous().numpy().data)
    # Part of the operation's name, hence of its signature; an error shows the first 47 characters.
    name = f"{layer} of {argument} with checksum {checksum:08x}"
    group.all_gather(0, 0, 0, DType.UINT8, name=name)
