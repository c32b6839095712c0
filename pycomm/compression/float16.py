"""Half the bytes: float16."""

import dataclasses

import numpy as np

from pycomm.compression.protocol import Array, GradientBucket

LARGEST = 65504.0  # of float16


@dataclasses.dataclass(frozen=True)
class Float16:
    """Sends float16, rounded to nearest; what is too large becomes the largest float16.

    2 bytes an element instead of 4; relative error 2**-11 for what lies between 6e-5 and 65504.
    Infinities and NaNs stay what they are. Sums are made in float32, in rank order.
    """

    def compress(self, bucket: GradientBucket) -> Array:
        if bucket.stream is not None:
            from pycomm.compression import cuda

            return cuda.to_float16(bucket)
        values = bucket.values
        kept = np.clip(values, -LARGEST, LARGEST)
        np.copyto(kept, values, where=np.isinf(values))
        return kept.astype(np.float16)

    def decompress(self, payloads: Array, bucket: GradientBucket) -> None:
        if bucket.stream is not None:
            from pycomm.compression import cuda

            cuda.sum_float16(payloads, bucket)
            return
        total = payloads[0].astype(np.float32)
        for payload in payloads[1:]:
            total += payload.astype(np.float32)
        np.divide(total, np.float32(bucket.divisor), out=bucket.values)
