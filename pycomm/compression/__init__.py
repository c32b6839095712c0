"""Gradients that travel in fewer bytes: compressors for ``DistributedOptimizer``.

``Float16``, ``BlockwiseInt8`` and ``TopK`` are ready to use; ``Compressor`` says what one of your
own has to do. ``docs/compression.md`` tells what each costs and gives up.
"""

from pycomm.compression.blockwise_int8 import BlockwiseInt8
from pycomm.compression.float16 import Float16
from pycomm.compression.protocol import Compressor, GradientBucket
from pycomm.compression.top_k import TopK

__all__ = ["BlockwiseInt8", "Compressor", "Float16", "GradientBucket", "TopK"]
