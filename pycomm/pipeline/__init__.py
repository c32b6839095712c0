"""Pipeline parallelism: a model cut into stages, each on a rank of its own."""

from pycomm.pipeline.grad_scaler import GradScaler
from pycomm.pipeline.pipeline import Pipeline
from pycomm.pipeline.skips import Stash, Take

__all__ = ["GradScaler", "Pipeline", "Stash", "Take"]
