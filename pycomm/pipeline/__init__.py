"""Pipeline parallelism: a model cut into stages, each on a rank of its own."""

from pycomm.pipeline.pipeline import Pipeline
from pycomm.pipeline.skips import Stash, Take

__all__ = ["Pipeline", "Stash", "Take"]
