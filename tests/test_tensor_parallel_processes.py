"""Split layers over real processes: each rank has a random state of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from split_transformer import batch, split, split_loss, whole, whole_loss

import pycomm
from pycomm.mesh import Mesh
from pycomm.runtime import group_of
from pycomm.tensor_parallel import whole_state_dict


@pytest.mark.mpi
@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_dropout_drops_what_it_drops_in_one_process(sequence: bool) -> None:
    pycomm.init()
    model = whole(dropout=0.3)
    mine = split(copy.deepcopy(model), group_of(None), sequence=sequence)
    x, y = batch(0)
    torch.manual_seed(5)
    expected = whole_loss(model(x), y)
    expected.backward()
    torch.manual_seed(5)
    loss = split_loss(mine(x), y, group_of(None))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for param in mine.parameters():
        assert param.grad is not None
        param.data = param.grad
    for param in model.parameters():
        param.data = param.grad
    for name, gradient in whole_state_dict(mine).items():
        torch.testing.assert_close(gradient, model.state_dict()[name], rtol=0, atol=1e-12)


@pytest.mark.mpi
def test_a_pipeline_of_split_stages_recomputes_its_dropout() -> None:
    pycomm.init()
    model = whole(dropout=0.3)
    mesh = Mesh({"pp": 2, "tp": -1})
    mine = split(model, mesh["tp"], sequence=True)
    gradients = []
    for recompute in (False, True):
        pipeline = pycomm.pipeline.Pipeline(
            copy.deepcopy(mine),
            lambda logits, target: split_loss(logits, target, mesh["tp"]),
            micro_batches=2,
            group=mesh["pp"],
            recompute=recompute,
        )
        torch.manual_seed(6)
        pipeline.step(*batch(0))
        gradients.append([param.grad for param in pipeline.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))
