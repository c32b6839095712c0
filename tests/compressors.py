"""What the tests of compressors share: buckets without a group, and awkward values."""

import numpy as np

from pycomm.compression import BlockwiseInt8, Float16, GradientBucket, TopK

COMPRESSORS = {
    "float16": Float16(),
    "int8": BlockwiseInt8(),
    "top_k": TopK(0.05),
    "top_k of all": TopK(1.0),
}


def numbers(count: int, seed: int) -> np.ndarray:
    """Of sizes far apart, some of them zero."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(count) * np.exp2(4 * random.standard_normal(count))
    values[random.random(count) < 0.1] = 0
    return values.astype(np.float32)


class Team:
    """The buckets of several ranks, and what they exchange, in one process."""

    def __init__(self, compressor, ranks: int, stream: int | None = None) -> None:
        self.compressor = compressor
        self.buckets = [
            GradientBucket("bucket 0", np.empty(0, np.float32), ranks, rank, ranks, stream=stream)
            for rank in range(ranks)
        ]

    def exchange(self, gradients: list[np.ndarray]) -> np.ndarray:
        """What every rank has afterwards: the mean, nearly."""
        payloads = []
        for bucket, values in zip(self.buckets, gradients, strict=True):
            bucket.values = values.copy()
            payloads.append(self.compressor.compress(bucket).copy())
        results = []
        for bucket in self.buckets:
            bucket.values = np.full_like(gradients[0], np.nan)  # compress may leave anything there
            self.compressor.decompress(np.stack(payloads), bucket)
            results.append(bucket.values)
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])
        return results[0]

    def residual(self, rank: int, count: int) -> np.ndarray:
        """What the rank has not sent yet."""
        return self.buckets[rank].memory["residual"][:count]
